"""Protobuf requests to tensors, and results to protobuf, without a server."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from services.gateway.api.grpc import codec
from services.gateway.api.grpc.status import code_of, details_of, trailers_of
from services.gateway.application.inference.core import InferenceResult, Timing
from services.gateway.domain.contract import Contract, WantedOutput
from services.gateway.domain.routing import parse_table
from tidegate.kernel import errors
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol import tensors
from tidegate.kernel.protocol.envelope import Reply, read_call_key, tensor
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.unit

OPEN = Contract(None)


def spec(name: str, datatype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=list(shape))


BATCHED = Contract(
    Signature(
        inputs=[spec("x", "FP32", 2)], outputs=[spec("y", "FP32", 1), spec("h", "FP16")], max_batch_size=4
    )
)

TYPED: list[tuple[str, str, list[Any], bytes]] = [
    ("BOOL", "bool_contents", [True, False], b"\1\0"),
    ("UINT8", "uint_contents", [255, 0], b"\xff\0"),
    ("UINT16", "uint_contents", [65535, 1], b"\xff\xff\1\0"),
    ("UINT32", "uint_contents", [2**32 - 1, 1], struct.pack("<2I", 2**32 - 1, 1)),
    ("UINT64", "uint64_contents", [2**64 - 1, 1], struct.pack("<2Q", 2**64 - 1, 1)),
    ("INT8", "int_contents", [-128, 127], b"\x80\x7f"),
    ("INT16", "int_contents", [-32768, 1], struct.pack("<2h", -32768, 1)),
    ("INT32", "int_contents", [-(2**31), 1], struct.pack("<2i", -(2**31), 1)),
    ("INT64", "int64_contents", [-(2**63), 1], struct.pack("<2q", -(2**63), 1)),
    ("FP32", "fp32_contents", [0.1, float("-inf")], struct.pack("<2f", 0.1, float("-inf"))),
    ("FP64", "fp64_contents", [0.1, 1e308], struct.pack("<2d", 0.1, 1e308)),
    ("BYTES", "bytes_contents", [b"\xff", b""], pack_strings([b"\xff", b""])),
]


def message(datatype: str = "FP32", shape: tuple[int, ...] = (1, 2), **given: Any) -> Any:
    made = pb.ModelInferRequest(model_name="m", **given)
    made.inputs.add(name="x", datatype=datatype, shape=shape)
    return made


def typed(datatype: str, field: str, values: list[Any], shape: tuple[int, ...]) -> Any:
    made = message(datatype, shape)
    getattr(made.inputs[0].contents, field).extend(values)
    return made


def raw(*values: bytes, **given: Any) -> Any:
    return message(raw_input_contents=list(values), **given)


ROW = struct.pack("<2f", 1, 2)


def refused(made: Any, contract: Contract = BATCHED) -> str:
    with pytest.raises(BadRequest) as caught:
        codec.decode(made, contract)
    return caught.value.message


@pytest.mark.parametrize(("datatype", "field", "values", "expected"), TYPED)
def test_typed_contents(datatype, field, values, expected):
    got = codec.decode(typed(datatype, field, values, (2,)), OPEN)
    assert [bytes(each) for each in got.data] == [expected]
    assert read_call_key(got.key).inputs == (tensor("x", datatype, (2,)),)
    assert (got.rows, got.wanted, got.binary) == (0, None, True)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_many_floats(datatype):
    """Sizes at which the encoded length takes another byte."""
    for size in (0, 1, 31, 32, 63, 64, 5000):
        values = np.linspace(-1, 1, size).astype(DATATYPES[datatype].numpy)
        made = typed(datatype, f"{datatype.lower()}_contents", values.tolist(), (size,))
        assert codec.decode(made, OPEN).data == [values.tobytes()]


def test_the_number_of_strings_is_limited(monkeypatch):
    monkeypatch.setattr(tensors, "MAX_STRINGS", 3)
    codec.decode(typed("BYTES", "bytes_contents", [b"a"] * 3, (3,)), OPEN)
    codec.decode(raw(pack_strings([b"a"] * 3), datatype="BYTES", shape=(3,)), OPEN)
    told = "input 'x': 4 elements of BYTES; the limit is 3"
    assert refused(typed("BYTES", "bytes_contents", [b"a"] * 4, (4,)), OPEN) == told
    assert refused(raw(pack_strings([b"a"] * 4), datatype="BYTES", shape=(4,)), OPEN) == told


def test_floats_beside_contents_of_another_type():
    made = typed("FP32", "fp32_contents", [1, 2], (2,))
    made.inputs[0].contents.int_contents.append(7)
    assert codec.decode(made, OPEN).data == [ROW]


def test_raw_contents():
    got = codec.decode(raw(ROW, id="seven"), BATCHED)
    assert (got.id, got.rows, got.data) == ("seven", 1, [ROW])


def test_outputs_and_parameters():
    made = raw(ROW)
    made.outputs.add(name="h")
    made.outputs.add(name="y").parameters["classification"].int64_param = 2
    for name, value in {"seed": 7, "mode": "fast", "exact": True, "heat": 0.5}.items():
        codec.set_parameters(made.parameters, {name: value})
    made.parameters["timeout"].int64_param = 3_000
    made.parameters["priority"].uint64_param = 9
    got = codec.decode(made, BATCHED)
    assert got.wanted == (WantedOutput("h", True), WantedOutput("y", True, 2))
    key = read_call_key(got.key)
    assert (key.outputs, key.parameters) == (
        ("h", "y"),
        {"seed": 7, "mode": "fast", "exact": True, "heat": 0.5},
    )
    assert (got.timeout_ms, got.priority) == (3.0, 7)


def test_wants_empty_final():
    made = raw(ROW)
    assert not codec.wants_empty_final(made)
    assert codec.EMPTY_FINAL not in made.parameters, "reading the parameter does not add it"
    made.parameters[codec.EMPTY_FINAL].bool_param = True
    assert codec.wants_empty_final(made)
    assert codec.decode(made, BATCHED).rows == 1


def with_parameter(made: Any, where: Any, name: str, **value: Any) -> Any:
    where.parameters[name].CopyFrom(pb.InferParameter(**value))
    return made


def both(*raws: bytes) -> Any:
    made = raw(*raws)
    made.inputs[0].contents.fp32_contents.extend([1, 2])
    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            pb.ModelInferRequest(),
            "expected 1 inputs but got 0 inputs for model ''. Got input(s) [], but missing required "
            "input(s) ['x']. Please provide all required input(s).",
        ),
        (raw(ROW, ROW), "got 2 raw_input_contents for 1 inputs; send one for each input"),
        (raw(ROW[:7]), "input byte size mismatch for input 'x' for model ''. Expected 8, got 7: FP32 [1, 2]"),
        (raw(ROW, datatype="FP64"), "inference input 'x' data-type is 'FP64', but model '' expects 'FP32'"),
        (
            raw(ROW, shape=(1, -1)),
            "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got [1, -1]",
        ),
        (
            raw(ROW, shape=(5, 2)),
            "inference request batch-size must be <= 4 for '': input 'x' has 5 rows, and needs 1 to 4",
        ),
        (
            both(ROW),
            "contents field must not be specified when using raw_input_contents for 'x' for model '': "
            "send one of them",
        ),
        (
            both(ROW, ROW),
            "contents field must not be specified when using raw_input_contents for 'x' for model '': "
            "send one of them",
        ),
        (typed("FP32", "fp32_contents", [1], (1, 2)), "input 'x': shape [1, 2] needs 2 elements, got 1"),
        (typed("FP32", "int_contents", [1, 2], (1, 2)), "input 'x': shape [1, 2] needs 2 elements, got 0"),
        (
            with_parameter(m := raw(ROW), m, "sequence_start", int64_param=1),
            "parameter 'sequence_start' must be a boolean, got 1",
        ),
        (
            with_parameter(m := raw(ROW), m.inputs[0], "shared_memory_region", string_param="r"),
            "input 'x': a shared memory region needs /infer or ModelInfer, a caller on the gateway's host, "
            "and TIDEGATE_SHARED_MEMORY=local. Without them, send the tensor as binary data",
        ),
        (with_parameter(m := raw(ROW), m, "nothing"), "request: parameter 'nothing' has no value"),
        (
            with_parameter(m := raw(ROW), m, "triton_x", int64_param=1),
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
            "specified. Rename 'triton_x'",
        ),
    ],
)
def test_refusals(made, said):
    assert refused(made) == said


@pytest.mark.parametrize(
    ("datatype", "field", "values", "said"),
    [
        ("FP16", "fp32_contents", [1, 2], "input 'x': FP16 has no typed contents; use raw_input_contents"),
        ("INT8", "int_contents", [1, 128], "input 'x': data is not INT8: "),
        ("UINT16", "uint_contents", [1, 65536], "input 'x': data is not UINT16: "),
    ],
)
def test_wrong_contents(datatype, field, values, said):
    assert refused(typed(datatype, field, values, (2,)), OPEN).startswith(said)


def answer(request: Any, data: list[Any], rows: int = 2) -> InferenceResult:
    entry = {
        "model": "m", "version": 3, "format": "onnx", "signature": None, "max_queue": 1,
        "retry": "safe", "wakeable": True, "ready": 1,
    }  # fmt: skip
    endpoint = {
        "targets": [{"deployment": "d", "weight": 1}],
        "versions": {"3": "d"},
        "default_timeout_ms": 1,
    }
    table = parse_table({"epoch": "e", "n": 1, "deployments": {"d": entry}, "endpoints": {"m": endpoint}})
    route = table.find("m", "")[1]
    reply = Reply(b"", 0, 0, 0, rows, 0, 0, 1, b"", list(data))
    outputs = (tensor("y", "FP32", (2,)),)
    return InferenceResult(route, request, rows, outputs, {"took": 3}, reply, Timing())


def test_an_answer():
    asked = codec.decode(raw(ROW, id="seven"), OPEN)
    told = codec.encode("m", answer(asked, [memoryview(ROW * 2)]), {})
    assert (told.model_name, told.model_version, told.id) == ("m", "3", "seven")
    (output,) = told.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "FP32", [2, 2])
    assert list(told.raw_output_contents) == [ROW * 2]
    assert told.parameters["took"].int64_param == 3


def test_an_answer_as_classes():
    made = raw(ROW)
    made.outputs.add(name="y").parameters["classification"].int64_param = 1
    told = codec.encode("m", answer(codec.decode(made, OPEN), [ROW * 2]), {"y": ["cat", "dog"]})
    assert (told.outputs[0].datatype, list(told.outputs[0].shape)) == ("BYTES", [2, 1])
    assert list(told.raw_output_contents) == [pack_strings(["2.000000:1:dog"] * 2)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadRequest, "INVALID_ARGUMENT"),
        (errors.NotFound, "NOT_FOUND"),
        (errors.Unauthorized, "UNAUTHENTICATED"),
        (errors.Forbidden, "PERMISSION_DENIED"),
        (errors.PayloadTooLarge, "RESOURCE_EXHAUSTED"),
        (errors.Overloaded, "UNAVAILABLE"),
        (errors.NoCapacity, "UNAVAILABLE"),
        (errors.NoRoutes, "UNAVAILABLE"),
        (errors.Unavailable, "UNAVAILABLE"),
        (errors.DeadlinePassed, "DEADLINE_EXCEEDED"),
        (errors.ModelFailed, "INTERNAL"),
        (TidegateError, "INTERNAL"),
    ],
)
def test_codes(error, code):
    assert code_of(error("x")).name == code


def test_every_error_has_a_code():
    assert all(
        code_of(cls("x")).name != "INTERNAL"
        for cls in errors.BY_REASON.values()
        if cls is not errors.ModelFailed
    )


def test_trailers():
    error = errors.Overloaded("later", retry_after_s=1.2)
    assert trailers_of(error, "abc") == (
        ("reason", "overloaded"),
        ("x-request-id", "abc"),
        ("retry-after", "2"),
    )
    assert details_of(error) == "later"
    assert len(details_of(errors.ModelFailed("ö" * 100_000)).encode()) <= 4096
