"""The parameters of a model's answer, over gRPC and over HTTP.

The wheel's Triton (2.51) lets a Python model set none; later ones and C++ backends can. So a server says here
what those say, over real sockets.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import orjson
import pytest

from services.worker.adapters import model as model_module
from services.worker.adapters.model import Model
from services.worker.adapters.triton_client import TritonClient
from tidegate.kernel.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import TensorSpec
from tidegate.kernel.triton_protocol import ModelInferResponse

pytestmark = pytest.mark.integration

SAID = {"prompt_tokens": 3, "temperature": 0.5, "cached": True, "finish_reason": "stop"}
OWN = {"triton_final_response": True, "sequence_id": 0, "sequence_start": False, "sequence_end": False}
KINDS = {int: "int64_param", float: "double_param", bool: "bool_param", str: "string_param"}
Y = np.array([[1.0, 2.0]], "<f4").tobytes()


def over_grpc(_: bytes, __: Any) -> bytes:
    """Answer as Triton's gRPC server does."""
    found = ModelInferResponse(model_name="m", model_version="1")
    found.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    found.raw_output_contents.append(Y)
    for name, value in (SAID | OWN).items():
        setattr(found.parameters[name], KINDS[type(value)], value)
    raw: bytes = found.SerializeToString()
    return raw


async def over_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer as Triton's HTTP server does."""
    head = orjson.dumps(
        {
            "model_name": "m",
            "model_version": "1",
            "parameters": SAID | OWN,
            "outputs": [
                {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
            ],
        }
    )
    try:
        while True:
            asked = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(asked.split(b"\r\ncontent-length: ")[1].split(b"\r\n")[0]))
            writer.write(
                b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n%s%s"
                % (len(head), len(head) + len(Y), head, Y)
            )
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


@pytest.fixture
async def model(tmp_path, monkeypatch) -> AsyncIterator[Model]:
    """A model on such a server, whose calls count as quick."""
    monkeypatch.setattr(model_module, "QUICK_S", 60.0)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(over_grpc)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    server.add_insecure_port(f"unix:{tmp_path}/grpc")
    await server.start()
    http = await asyncio.start_unix_server(over_http, tmp_path / "http")
    client = TritonClient(f"unix:{tmp_path}/grpc", str(tmp_path / "http"))
    yield Model(client, "m", [TensorSpec(name="y", datatype="FP32", shape=[2])])
    await client.close()
    http.close()
    await server.stop(grace=0)


def request(parameters: dict[str, Any]) -> Request:
    key = call_key((tensor("x", "FP32", (2,)),), (), parameters)
    return read_request(request_frame(os.urandom(16), 1, 1, key, [Y]))


@pytest.mark.parametrize("way", ["infer_raw", "infer_http"])
async def test_what_the_model_said_is_in_the_answer(model, monkeypatch, way):
    """The parameters that Triton adds are not."""
    went: list[str] = []
    for name in ("infer_raw", "infer_http"):
        original = getattr(TritonClient, name)

        async def noted(self: TritonClient, *given: Any, name: str = name, original: Any = original) -> Any:
            went.append(name)
            return await original(self, *given)

        monkeypatch.setattr(TritonClient, name, noted)
    # JSON has no exact form for every float, so such a parameter goes over gRPC. Other calls go over HTTP
    # once they are known to be quick.
    for _ in range(3):
        answer = await model.call([request({"a": 1.5} if way == "infer_raw" else {})], 10)
    assert went[-1] == way
    assert answer.parameters == SAID
    assert [(o.name, bytes(o.raw)) for o in answer.outputs] == [("y", Y)]
