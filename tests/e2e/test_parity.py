"""Through the gateway a model answers as the same Triton does when it is asked directly, bit for bit.

Every datatype x {JSON or typed contents, binary or raw contents} x {REST, gRPC} x batch {1, 5}: one identity
model, deployed from a Triton directory, and the same directory served by a Triton of the test's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.conftest import PATIENCE_S
from tests.e2e import wrong_requests
from tests.e2e.direct import Doors, running_triton
from tests.e2e.shared_memory_story import Story
from tests.e2e.wrong_requests import DIFFERENT, NOT_500, REST, RPC
from tests.triton_examples.models import MODELS
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

pytestmark = pytest.mark.e2e

NAME = "everything"
WIDTH = 3
HALF = ("FP16", "BF16")
HEADER = "Inference-Header-Content-Length"

MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(self._outputs(request)) for request in requests]

    def _outputs(self, request):
        found = {"out_" + tensor.name()[3:]: tensor for tensor in request.inputs()}
        # numpy has no BF16: it goes through as it is.
        return [
            pb_utils.Tensor.from_dlpack(name, found[name])
            if name == "out_BF16"
            else pb_utils.Tensor(name, found[name].as_numpy())
            for name in request.requested_output_names()
            if name in found
        ]
"""

CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def config() -> str:
    tensors = []
    for datatype in DATATYPES:
        kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        labels = 'label_filename: "labels.txt"' if datatype == "FP32" else ""
        tensors += [
            f'input {{ name: "in_{datatype}" data_type: {kind} dims: [{WIDTH}] optional: true }}',
            f'output {{ name: "out_{datatype}" data_type: {kind} dims: [{WIDTH}] {labels} }}',
        ]
    return "\n".join([f'name: "{NAME}"', 'backend: "python"', "max_batch_size: 8", *tensors])


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Triton model repository with the model in it."""
    repository = tmp_path_factory.mktemp("parity")
    version = repository / NAME / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(config())
    (version.parent / "labels.txt").write_text("cat\ndog\n")
    MODELS[wrong_requests.NAME].write(repository / wrong_requests.NAME)
    return repository


@pytest.fixture(scope="session")
def direct(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """A Triton of its own."""
    with running_triton(directory, tmp_path_factory.mktemp("triton") / "log") as doors:
        yield doors


@pytest.fixture(scope="session")
def gateway(stack, directory: Path) -> Doors:
    """The gateway, with the same directory deployed."""
    for name in (wrong_requests.NAME, NAME):
        stack.deploy(directory / name, name, "--min", "1", "--max", "1")
    return Doors(stack.settings.gateway_url, stack.settings.gateway_grpc_target)


def values(datatype: str, batch: int) -> tuple[list[Any], bytes]:
    """Some values of a datatype, its extremes among them: as Python has them, and as raw bytes."""
    count = batch * WIDTH
    if datatype == "BYTES":
        texts = ["", "größe", 'a "quoted"\nline\0'] * batch
        return texts, pack_strings(texts)
    if datatype == "BF16":
        return [], np.array([0, 0x3F80, 0xFF7F] * batch, "<u2").tobytes()
    dtype = np.dtype(DATATYPES[datatype].numpy)
    if dtype.kind == "f":
        limit = np.finfo(dtype)
        some = [0.1, limit.max, limit.tiny, -0.0, limit.min, 1 / 3, np.inf, -np.inf, np.nan]
    elif dtype.kind == "b":
        some = [True, False, True]
    else:
        limits = np.iinfo(dtype)
        some = [limits.max, limits.min, 7]
    array = np.resize(np.array(some, dtype), count)
    return array.tolist(), array.tobytes()


def rest(doors: Doors, datatype: str, batch: int, binary: bool) -> tuple[int, Any]:
    """Ask over HTTP: the status, and the output's description and raw bytes."""
    plain, raw = values(datatype, batch)
    tensor: dict[str, Any] = {"name": f"in_{datatype}", "datatype": datatype, "shape": [batch, WIDTH]}
    wanted: dict[str, Any] = {"name": f"out_{datatype}"}
    if binary:
        tensor["parameters"] = {"binary_data_size": len(raw)}
        wanted["parameters"] = {"binary_data": True}
    else:
        tensor["data"] = plain
    head = json.dumps({"id": "7", "inputs": [tensor], "outputs": [wanted]}).encode()
    answer = httpx.post(
        f"{doors.http}/v2/models/{NAME}/infer",
        content=head + raw if binary else head,
        headers={HEADER: str(len(head))} if binary else {},
        timeout=60,
    )
    if answer.status_code != 200:
        return answer.status_code, None
    length = int(answer.headers.get(HEADER, len(answer.content)))
    told = json.loads(answer.content[:length])
    (output,) = told.pop("outputs")
    told.pop("model_version")
    if binary:
        data = answer.content[length:]
        assert output.pop("parameters") == {"binary_data_size": len(data)}
    elif datatype == "BYTES":
        data = pack_strings(output.pop("data"))
    else:
        data = np.array(output.pop("data"), DATATYPES[datatype].numpy).tobytes()
    return 200, (told, output, data)


def rpc(doors: Doors, datatype: str, batch: int, binary: bool) -> tuple[str, Any]:
    """Ask over gRPC: the status, and the output's description and raw bytes."""
    plain, raw = values(datatype, batch)
    asked = pb.ModelInferRequest(model_name=NAME, id="7")
    tensor = asked.inputs.add(name=f"in_{datatype}", datatype=datatype, shape=[batch, WIDTH])
    asked.outputs.add(name=f"out_{datatype}")
    if binary:
        asked.raw_input_contents.append(raw)
    elif datatype == "BYTES":
        tensor.contents.bytes_contents.extend(unpack_strings(raw))
    elif datatype in CONTENTS:
        getattr(tensor.contents, CONTENTS[datatype]).extend(plain)
    with grpc.insecure_channel(doors.grpc) as channel:
        try:
            told = stubs.GRPCInferenceServiceStub(channel).ModelInfer(asked, timeout=60)
        except grpc.RpcError as error:
            return error.code().name, None
    (output,) = told.outputs
    description = (told.model_name, told.id, output.name, output.datatype, list(output.shape))
    return "OK", (description, *told.raw_output_contents)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_rest(gateway: Doors, direct: Doors, datatype: str, binary: bool, batch: int) -> None:
    expected = rest(direct, datatype, batch, binary)
    assert expected[0] == (400 if datatype in HALF and not binary else 200)
    assert rest(gateway, datatype, batch, binary) == expected
    if expected[1]:
        assert expected[1][2] == values(datatype, batch)[1], "it is the identity"


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("binary", [False, True], ids=["typed", "raw"])
@pytest.mark.parametrize("datatype", DATATYPES)
def test_grpc(gateway: Doors, direct: Doors, datatype: str, binary: bool, batch: int) -> None:
    expected = rpc(direct, datatype, batch, binary)
    assert expected[0] == ("INVALID_ARGUMENT" if datatype in HALF and not binary else "OK")
    assert rpc(gateway, datatype, batch, binary) == expected
    if expected[1]:
        assert expected[1][1] == values(datatype, batch)[1], "it is the identity"


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("datatype", ["UINT8", "INT32", "UINT64", "FP32", "FP64"])
def test_classes(gateway: Doors, direct: Doors, datatype: str, count: int) -> None:
    numbers = [[1, 200, 3], [3, 3, 0], [0, 0, 0]]
    tensor = {"name": f"in_{datatype}", "datatype": datatype, "shape": [3, WIDTH], "data": numbers}
    wanted = {"name": f"out_{datatype}", "parameters": {"classification": count}}
    body = {"inputs": [tensor], "outputs": [wanted]}

    def ask(doors: Doors) -> Any:
        answer = httpx.post(f"{doors.http}/v2/models/{NAME}/infer", json=body, timeout=60)
        return answer.json()["outputs"]

    expected = ask(direct)
    end = time.monotonic() + PATIENCE_S
    while ask(gateway) != expected and time.monotonic() < end:
        time.sleep(0.2)  # the names of the classes reach the gateways a moment after the model is ready
    assert ask(gateway) == expected


def test_configuration_and_statistics_have_the_same_shape(gateway: Doors, direct: Doors) -> None:
    asked, told = (
        httpx.get(f"{d.http}/v2/models/{NAME}/config", timeout=PATIENCE_S).json() for d in (direct, gateway)
    )
    differs = {key for key in asked.keys() | told.keys() if asked.get(key) != told.get(key)}
    assert differs <= {"instance_group", "parameters", "version_policy", "dynamic_batching", "model_warmup"}
    asked, told = (
        httpx.get(f"{d.http}/v2/models/{NAME}/stats", timeout=PATIENCE_S).json()["model_stats"][0]
        for d in (direct, gateway)
    )
    assert asked.keys() == told.keys()
    assert asked["inference_stats"].keys() == told["inference_stats"].keys()


@pytest.mark.parametrize("name", [*REST, *RPC])
def test_a_wrong_request_gets_tritons_words(gateway: Doors, direct: Doors, name: str) -> None:
    """The gateway's error begins with Triton's, except for those that the tables of differences name."""
    wrong = REST.get(name) or RPC[name]
    expected, got = wrong.send(direct), wrong.send(gateway)
    same = got.status == expected.status and got.text.startswith(first_words(expected.text))
    if name in DIFFERENT:
        assert not same, f"it is no longer different: {got}"
        assert got.status not in (500, "INTERNAL")
    elif name in NOT_500:
        assert expected.status in (500, "INTERNAL")
        assert got.status in (400, "INVALID_ARGUMENT")
        assert got.text.startswith(expected.text.partition(": ")[0])
    else:
        assert same, f"Triton: {expected}; the gateway: {got}"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_shared_memory(gateway: Doors, direct: Doors, protocol: str) -> None:
    expected, got = (Story(doors, protocol).run() for doors in (direct, gateway))
    sums, differences = (np.arange(16) + 3).tolist(), (np.arange(16) - 3).tolist()
    assert [[sums, [1, 16]], [differences, [1, 16]]] in expected
    for theirs, ours in zip(expected, got, strict=True):
        if isinstance(theirs, str):
            assert ours.startswith(theirs)
        else:
            assert ours == theirs


def first_words(text: str) -> str:
    """Triton's error without its long note about shapes."""
    return text.partition(" NOTE: ")[0]
