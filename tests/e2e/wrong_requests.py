"""A table of wrong requests, to be sent to Triton and to the gateway. Both must say the same.

``NOT_500`` names the requests whose mistake is the caller's, although Triton answers 500. ``DIFFERENT`` names
those that are answered differently on purpose, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import httpx
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.e2e.direct import Doors

NAME = "simple"
INFER = f"/v2/models/{NAME}/infer"
HEADER = "Inference-Header-Content-Length"
ZEROS = [0] * 16


class Answer(NamedTuple):
    """A status and the text of an error."""

    status: int | str
    text: str


class Rest(NamedTuple):
    """A request over HTTP. ``body``: bytes, or what becomes JSON; ``tail``: binary data after it."""

    path: str = INFER
    body: Any = b""
    headers: dict[str, str] = {}  # noqa: RUF012  never written to
    method: str = "POST"
    tail: bytes | None = None

    def send(self, doors: Doors) -> Answer:
        """Send it; return the answer."""
        body = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        if self.tail is not None:
            headers = {HEADER: str(len(body)), **headers}
        answer = httpx.request(
            self.method,
            doors.http + self.path,
            content=body + (self.tail or b""),
            headers=headers,
            timeout=30,
        )
        try:
            told = answer.json()
        except ValueError:
            told = {}
        return Answer(answer.status_code, plain(told.get("error", "") if isinstance(told, dict) else ""))


class Rpc(NamedTuple):
    """A call over gRPC."""

    method: str
    message: Any

    def send(self, doors: Doors) -> Answer:
        """Send it; return the answer."""
        with grpc.insecure_channel(doors.grpc) as channel:
            try:
                getattr(stubs.GRPCInferenceServiceStub(channel), self.method)(self.message, timeout=30)
            except grpc.RpcError as error:
                return Answer(error.code().name, plain(error.details()))
        return Answer("OK", "")


def plain(text: str) -> str:
    """Return an error without the request's id, which the gateway returns elsewhere."""
    return re.sub(r"^\[request id: [^\]]*\] ", "", text)


def tensor(name: str = "INPUT0", **changes: Any) -> dict[str, Any]:
    """Return a right input with changes; ``...`` removes a field."""
    found = {"name": name, "datatype": "INT32", "shape": [1, 16], "data": ZEROS} | changes
    return {field: value for field, value in found.items() if value is not ...}


def body(*inputs: Any, **more: Any) -> dict[str, Any]:
    """Return a body with these inputs; none: two right ones."""
    return {"inputs": list(inputs) or [tensor(), tensor("INPUT1")]} | more


def first(**changes: Any) -> dict[str, Any]:
    """Return a body whose first input is wrong."""
    return body(tensor(**changes), tensor("INPUT1"))


def wanted(**parameters: Any) -> dict[str, Any]:
    """Return a body with parameters of an output."""
    return body(outputs=[{"name": "OUTPUT0", "parameters": parameters}])


BINARY = {"data": ..., "parameters": {"binary_data_size": 64}}
REGION = {"shared_memory_region": "none", "shared_memory_byte_size": 64}
SHM = "/v2/systemsharedmemory"

REST: dict[str, Rest] = {
    "unknown model": Rest("/v2/models/nobody/infer", body()),
    "unknown version": Rest(f"/v2/models/{NAME}/versions/9/infer", body()),
    "version that is no number": Rest(f"/v2/models/{NAME}/versions/x/infer", body()),
    "not JSON": Rest(body=b'{"inputs": ['),
    "empty body": Rest(),
    "a list": Rest(body=[]),
    "no inputs": Rest(body={}),
    "inputs are no list": Rest(body={"inputs": 5}),
    "input without a name": Rest(body=first(name=...)),
    "input without a datatype": Rest(body=first(datatype=...)),
    "input without a shape": Rest(body=first(shape=...)),
    "input without data": Rest(body=first(data=...)),
    "unknown input": Rest(body=body(tensor(), tensor("INPUT1"), tensor("nope"))),
    "missing input": Rest(body=body(tensor())),
    "an input twice": Rest(body=body(tensor(), tensor())),
    "wrong datatype": Rest(body=first(datatype="FP32")),
    "unknown datatype": Rest(body=first(datatype="FLOAT")),
    "wrong shape": Rest(body=first(shape=[1, 15], data=[0] * 15)),
    "wrong rank": Rest(body=first(shape=[16])),
    "batch too large": Rest(
        body=body(*(tensor(name, shape=[9, 16], data=ZEROS * 9) for name in ("INPUT0", "INPUT1")))
    ),
    "batch of zero": Rest(
        body=body(*(tensor(name, shape=[0, 16], data=[]) for name in ("INPUT0", "INPUT1")))
    ),
    "different batches": Rest(body=body(tensor(shape=[2, 16], data=ZEROS * 2), tensor("INPUT1"))),
    "too little data": Rest(body=first(data=[0] * 15)),
    "too much data": Rest(body=first(data=[0] * 17)),
    "strings for numbers": Rest(body=first(data=["a"] * 16)),
    "fractions for integers": Rest(body=first(data=[1.5] * 16)),
    "integers out of range": Rest(body=first(data=[2**40] * 16)),
    "negative shape": Rest(body=first(shape=[-1, 16])),
    "unknown output": Rest(body=body(outputs=[{"name": "nope"}])),
    "output without a name": Rest(body=body(outputs=[{}])),
    "outputs are no list": Rest(body=body(outputs=5)),
    "negative classification": Rest(body=wanted(classification=-1)),
    "classification of a string": Rest(body=wanted(classification="two")),
    "too little binary data": Rest(body=first(data=..., parameters={"binary_data_size": 60}), tail=bytes(60)),
    "binary data past the end": Rest(body=first(**BINARY), tail=bytes(60)),
    "raw data for two inputs": Rest(body=b"", headers={HEADER: "0"}, tail=bytes(64)),
    "binary data left over": Rest(body=first(**BINARY), tail=bytes(68)),
    "binary data without a header": Rest(body=first(**BINARY)),
    "header longer than the body": Rest(body=body(), headers={HEADER: "99999"}),
    "header that is no number": Rest(body=body(), headers={HEADER: "x"}),
    "priority of a string": Rest(body=body(parameters={"priority": "high"})),
    "negative priority": Rest(body=body(parameters={"priority": -1})),
    "timeout of a string": Rest(body=body(parameters={"timeout": "1s"})),
    "negative timeout": Rest(body=body(parameters={"timeout": -1})),
    "parameter that is an object": Rest(body=body(parameters={"mine": {}})),
    "reserved parameter": Rest(body=body(parameters={"triton_x": 1})),
    "unknown region": Rest(body=first(data=..., parameters=REGION)),
    "region without a size": Rest(body=first(data=..., parameters={"shared_memory_region": "none"})),
    "region and data": Rest(body=first(parameters=REGION)),
    "size without a region": Rest(body=first(parameters={"shared_memory_byte_size": 64})),
    "unknown region of an output": Rest(body=wanted(**REGION)),
    "region and classification": Rest(body=wanted(**REGION, classification=1)),
    "metadata of an unknown model": Rest("/v2/models/nobody", method="GET"),
    "metadata of an unknown version": Rest(f"/v2/models/{NAME}/versions/9", method="GET"),
    "config of an unknown model": Rest("/v2/models/nobody/config", method="GET"),
    "statistics of an unknown model": Rest("/v2/models/nobody/stats", method="GET"),
    "readiness of an unknown model": Rest("/v2/models/nobody/ready", method="GET"),
    "index that is not JSON": Rest("/v2/repository/index", b"{"),
    "status of an unknown region": Rest(f"{SHM}/region/none/status", method="GET"),
    "unregister an unknown region": Rest(f"{SHM}/region/none/unregister"),
    "register without a key": Rest(f"{SHM}/region/r/register", {"offset": 0, "byte_size": 64}),
    "register without a size": Rest(f"{SHM}/region/r/register", {"key": "/none", "offset": 0}),
    "register an unknown segment": Rest(f"{SHM}/region/r/register", {"key": "/no-such", "byte_size": 64}),
    "status of an unknown CUDA region": Rest("/v2/cudasharedmemory/region/none/status", method="GET"),
    "load": Rest("/v2/repository/models/nobody/load"),
    "trace settings of a number": Rest("/v2/trace/setting", {"trace_rate": {}}),
    "trace settings of an unknown model": Rest("/v2/models/nobody/trace/setting", method="GET"),
    "unknown log setting": Rest("/v2/logging", {"colour": "red"}),
    "unknown path": Rest("/v2/nothing", method="GET"),
    "inference by GET": Rest(INFER, method="GET"),
}


def request(
    change: Callable[[Any], object] = lambda _: None, raws: tuple[int, ...] = (64, 64), **fields: Any
) -> Any:
    """Return a right request with raw contents of these sizes, changed."""
    found = pb.ModelInferRequest(model_name=NAME, **fields)
    for name in ("INPUT0", "INPUT1"):
        found.inputs.add(name=name, datatype="INT32", shape=[1, 16])
    found.raw_input_contents.extend(bytes(size) for size in raws)
    change(found)
    return found


def _shape(*sizes: int) -> Callable[[Any], object]:
    def change(message: Any) -> None:
        del message.inputs[0].shape[:]
        message.inputs[0].shape.extend(sizes)

    return change


def _parameter(name: str, **value: Any) -> Callable[[Any], object]:
    return lambda message: _set(message.parameters[name], value)


def _set(parameter: Any, value: dict[str, Any]) -> None:
    for kind, each in value.items():
        setattr(parameter, kind, each)


def _region(message: Any) -> None:
    message.inputs[0].parameters["shared_memory_region"].string_param = "none"
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 64
    del message.raw_input_contents[0]


def _both(message: Any) -> None:
    message.inputs[0].contents.int_contents.extend(ZEROS)


def _classes(message: Any) -> None:
    message.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = -1


RPC: dict[str, Rpc] = {
    "grpc: unknown model": Rpc("ModelInfer", pb.ModelInferRequest(model_name="nobody")),
    "grpc: unknown version": Rpc("ModelInfer", request(model_version="9")),
    "grpc: no inputs": Rpc("ModelInfer", pb.ModelInferRequest(model_name=NAME)),
    "grpc: wrong datatype": Rpc("ModelInfer", request(lambda m: setattr(m.inputs[0], "datatype", "FP32"))),
    "grpc: unknown datatype": Rpc("ModelInfer", request(lambda m: setattr(m.inputs[0], "datatype", "FLOAT"))),
    "grpc: wrong shape": Rpc("ModelInfer", request(_shape(1, 15), (60, 64))),
    "grpc: different batches": Rpc("ModelInfer", request(_shape(9, 16), (576, 64))),
    "grpc: unknown input": Rpc("ModelInfer", request(lambda m: setattr(m.inputs[0], "name", "nope"))),
    "grpc: missing input": Rpc("ModelInfer", request(lambda m: m.inputs.pop(), (64,))),
    "grpc: unknown output": Rpc("ModelInfer", request(lambda m: m.outputs.add(name="nope"))),
    "grpc: too few raw contents": Rpc("ModelInfer", request(raws=(64,))),
    "grpc: too little raw data": Rpc("ModelInfer", request(raws=(60, 64))),
    "grpc: contents and raw contents": Rpc("ModelInfer", request(_both)),
    "grpc: contents and too few raw contents": Rpc("ModelInfer", request(_both, raws=(64,))),
    "grpc: negative classification": Rpc("ModelInfer", request(_classes)),
    "grpc: unknown region": Rpc("ModelInfer", request(_region)),
    "grpc: priority of a string": Rpc("ModelInfer", request(_parameter("priority", string_param="x"))),
    "grpc: timeout of a string": Rpc("ModelInfer", request(_parameter("timeout", string_param="x"))),
    "grpc: reserved parameter": Rpc("ModelInfer", request(_parameter("triton_x", int64_param=1))),
    "grpc: metadata of an unknown model": Rpc("ModelMetadata", pb.ModelMetadataRequest(name="nobody")),
    "grpc: config of an unknown model": Rpc("ModelConfig", pb.ModelConfigRequest(name="nobody")),
    "grpc: statistics of an unknown model": Rpc("ModelStatistics", pb.ModelStatisticsRequest(name="nobody")),
    "grpc: readiness of an unknown model": Rpc("ModelReady", pb.ModelReadyRequest(name="nobody")),
    "grpc: status of an unknown region": Rpc(
        "SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name="none")
    ),
    "grpc: register an unknown segment": Rpc(
        "SystemSharedMemoryRegister",
        pb.SystemSharedMemoryRegisterRequest(name="r", key="/no-such", byte_size=64),
    ),
    "grpc: load": Rpc("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody")),
}

# Triton answers 500, or INTERNAL. Clients and proxies repeat such a request, so the gateway answers 400. The
# words before the first colon are the same.
NOT_500 = frozenset(
    {
        "not JSON",
        "a list",
        "no inputs",
        "inputs are no list",
        "input without a name",
        "input without a datatype",
        "input without a shape",
        "too little data",
        "too much data",
        "strings for numbers",
        "fractions for integers",
        "negative shape",
        "output without a name",
        "outputs are no list",
        "priority of a string",
        "negative priority",
        "timeout of a string",
        "negative timeout",
        "index that is not JSON",
        "register an unknown segment",
        "grpc: register an unknown segment",
    }
)
_BY_NAME = "the gateway names the input that is wrong"
_ONE_ANSWER = "HTTP and gRPC have the same words here"
_MISSING = "a model that does not exist is not found, on every path"
_OWN = "the gateway's own words: no client of Triton's compares these"
DIFFERENT: dict[str, str] = {
    "version that is no number": _MISSING,
    "empty body": "a body that is empty by mistake is not raw data",
    "unknown input": _BY_NAME,
    "wrong rank": _BY_NAME,
    "different batches": _BY_NAME,
    "grpc: different batches": "the gateway checks each input before it compares them",
    "batch of zero": "a batch has at least one row",
    "integers out of range": "Triton takes the lowest 32 bits; the gateway changes no numbers",
    "negative classification": _ONE_ANSWER,
    "classification of a string": _ONE_ANSWER,
    "header that is no number": "Triton takes it as 0; the gateway says that it is wrong",
    "region without a size": "as later versions of Triton, which refuse it",
    "size without a region": "as later versions of Triton, which refuse it",
    "statistics of an unknown model": _MISSING,
    "grpc: statistics of an unknown model": _MISSING,
    "readiness of an unknown model": _MISSING,
    "trace settings of an unknown model": _MISSING,
    "load": "loading needs the scope operate",
    "grpc: load": "loading needs the scope operate",
    "trace settings of a number": "the settings can only be read",
    "unknown log setting": "Triton ignores it; the gateway says that there is none",
    "unknown path": _OWN,
    "inference by GET": _OWN,
    "grpc: unknown datatype": "the gateway repeats the datatype that was sent",
    "grpc: priority of a string": _ONE_ANSWER,
    "grpc: timeout of a string": _ONE_ANSWER,
    "grpc: reserved parameter": _ONE_ANSWER,
}
