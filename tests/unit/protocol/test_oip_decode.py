"""Requests of the Open Inference Protocol: what is taken, and the sentence for everything that is not."""

from __future__ import annotations

import re
import struct
from typing import Any

import orjson
import pytest

from services.gateway.domain.contract import Contract, WantedOutput
from services.gateway.domain.oip import decode
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import read_call_key
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.unit


def spec(name: str, datatype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=list(shape))


BATCHED = Contract(
    Signature(
        inputs=[spec("x", "FP32", 2), spec("text", "BYTES", -1)],
        outputs=[spec("y", "FP32", 1), spec("z", "INT64")],
        max_batch_size=4,
    )
)
SINGLE = Contract(Signature(inputs=[spec("x", "FP32", 2)], outputs=[spec("y", "FP32", 1)], max_batch_size=8))
PLAIN = Contract(Signature(inputs=[spec("x", "FP32", -1, 2)], outputs=[spec("y", "FP32", 1)]))
OPEN = Contract(None)

X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
TEXT = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}


def x(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**X, **changes}.items() if value is not ...}


def ask(contract: Contract, *inputs: Any, tail: bytes = b"", **fields: Any):
    head = orjson.dumps({"inputs": list(inputs), **fields})
    return decode(head + tail, len(head) if tail else None, contract)


def refused(contract: Contract, *inputs: Any, tail: bytes = b"", **fields: Any) -> str:
    with pytest.raises(BadRequest) as caught:
        ask(contract, *inputs, tail=tail, **fields)
    return caught.value.message


def test_a_request():
    got = ask(BATCHED, TEXT, X, id="seven", parameters={"temperature": 0.5})
    assert (got.id, got.rows, got.wanted, got.binary) == ("seven", 1, None, False)
    assert got.data == [struct.pack("<2f", 1, 2), b"\1\0\0\0a"], "in the signature's order"
    key = read_call_key(got.key)
    assert [(t.name, t.datatype.name, t.dims) for t in key.inputs] == [
        ("x", "FP32", (2,)),
        ("text", "BYTES", (1,)),
    ]
    assert (key.outputs, key.parameters) == ((), {"temperature": 0.5})


def test_like_requests_share_a_key_whatever_their_batch():
    one = ask(SINGLE, X, id="a")
    other = ask(
        SINGLE, x(shape=[3, 2], data=[[1, 2], [3, 4], [5, 6]]), parameters={"binary_data_output": True}
    )
    assert one.key == other.key
    assert (one.rows, other.rows) == (1, 3)


def test_what_differs_has_another_key():
    plain = ask(PLAIN, x(shape=[1, 2]))
    keys = {
        plain.key,
        ask(PLAIN, x(shape=[2, 2], data=[1] * 4)).key,
        ask(PLAIN, X, outputs=[{"name": "y"}]).key,
        ask(PLAIN, X, parameters={"k": 1}).key,
        ask(PLAIN, X, parameters={"k": 2}).key,
    }
    assert len(keys) == 5


def test_many_different_keys():
    """The memory of keys is bounded; what was forgotten is made again."""
    contract = Contract(None)

    def key(size: int) -> bytes:
        return ask(contract, x(shape=[0, size], data=[])).key

    first = key(1)
    assert len({key(size) for size in range(1, 1500)}) == 1499
    assert key(1) == first


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_within_the_limit(rows):
    assert (
        ask(BATCHED, x(shape=[rows, 2], data=[0] * rows * 2), TEXT | {"shape": [rows, 0], "data": []}).rows
        == rows
    )


def test_without_a_batch_axis():
    got = ask(PLAIN, x(shape=[3, 2], data=[0] * 6))
    assert got.rows == 0
    assert read_call_key(got.key).inputs[0].dims == (3, 2)


def test_without_a_signature_anything_goes():
    got = ask(
        OPEN, x(shape=[5], data=[0] * 5), {"name": "q", "datatype": "BOOL", "shape": [], "data": [True]}
    )
    assert got.rows == 0
    assert [(t.name, t.dims) for t in read_call_key(got.key).inputs] == [("x", (5,)), ("q", ())]
    assert ask(OPEN, X, outputs=[{"name": "whatever"}]).wanted == (WantedOutput("whatever", False),)


def test_binary_inputs():
    raw, words = struct.pack("<4f", 1, 2, 3, 4), pack_strings(["a", "", "ü"])
    got = ask(
        BATCHED,
        x(shape=[2, 2], data=..., parameters={"binary_data_size": len(raw)}),
        {"name": "text", "datatype": "BYTES", "shape": [2, 2], "data": ["p", "q", "r", "s"]},
        tail=raw,
    )
    assert [bytes(d) for d in got.data] == [raw, pack_strings(["p", "q", "r", "s"])]
    got = ask(
        BATCHED,
        {
            "name": "text",
            "datatype": "BYTES",
            "shape": [1, 3],
            "parameters": {"binary_data_size": len(words)},
        },
        x(data=..., parameters={"binary_data_size": 8}),
        tail=words + raw[:8],
    )
    assert [bytes(d) for d in got.data] == [raw[:8], words]


def test_an_empty_binary_input():
    got = ask(PLAIN, x(shape=[0, 2], data=..., parameters={"binary_data_size": 0}))
    assert [bytes(d) for d in got.data] == [b""]


def test_binary_only_datatypes_come_binary():
    got = ask(OPEN, x(datatype="FP16", data=..., parameters={"binary_data_size": 4}), tail=bytes(4))
    assert bytes(got.data[0]) == bytes(4)


def test_wanted_outputs():
    wanted = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}]
    assert ask(BATCHED, X, TEXT, outputs=wanted).wanted == (WantedOutput("y", True), WantedOutput("z", False))
    got = ask(BATCHED, X, TEXT, outputs=wanted, parameters={"binary_data_output": True})
    assert got.wanted == (WantedOutput("y", True), WantedOutput("z", True))
    assert got.binary
    assert read_call_key(got.key).outputs == ("y", "z")
    assert ask(BATCHED, X, TEXT, outputs=[]).wanted is None
    assert ask(BATCHED, X, TEXT, outputs=None).wanted is None


def test_parameters_of_the_door_do_not_reach_the_model():
    got = ask(SINGLE, X, parameters={"binary_data_output": True, "classification": 0, "seed": 7})
    assert read_call_key(got.key).parameters == {"seed": 7}


@pytest.mark.parametrize("id_", [0, ""])
def test_a_sequence_without_an_id_is_none(id_):
    got = ask(SINGLE, X, parameters={"sequence_id": id_, "sequence_start": True, "sequence_end": True})
    assert got.sequence is None
    assert read_call_key(got.key).parameters == {}


@pytest.mark.parametrize("id_", [1, 2**64 - 1, "session-1"])
def test_the_sequence_of_a_request(id_):
    got = ask(SINGLE, X, parameters={"sequence_id": id_, "sequence_start": True, "seed": 7})
    assert got.sequence == (id_, True, False)
    assert read_call_key(got.key).parameters == {
        "sequence_id": id_, "sequence_start": True, "sequence_end": False, "seed": 7
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request is not JSON: it is empty"),
        (b"[" * 5000, "the request is not JSON: it nests lists or objects more than 1,024 levels deep"),
        (
            b'{"inputs": 1e400}',
            "the request is not JSON: a number is too large for a 64-bit float",
        ),
        (b"{", "the request is not JSON: "),
        (b"\xff", "the request is not JSON: "),
        (b'{"inputs": [nan]}', "the request is not JSON: "),
        (b"[]", "the request must be a JSON object with 'inputs'"),
        (b"null", "the request must be a JSON object with 'inputs'"),
        (b'{"inputs": [NaN], "id": "\\ud800"}', "the request is not JSON: "),
        (b'{"inputs": [NaN], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "the request is not JSON: "),
    ],
)
def test_no_json_object(body, message):
    with pytest.raises(BadRequest, match=re.escape(message)):
        decode(body, None, SINGLE)


@pytest.mark.parametrize("length", [-1, 3, 2**70])
def test_header_length(length):
    with pytest.raises(BadRequest) as caught:
        decode(b"{}", length, SINGLE)
    assert caught.value.message == (
        f"inference header size should be in range (0, 2), got: {length}: Inference-Header-Content-Length "
        "must be the number of bytes of the body that are JSON"
    )


@pytest.mark.parametrize("inputs", [None, [], {}, "x", 1])
def test_no_inputs(inputs):
    body = orjson.dumps({"inputs": inputs})
    with pytest.raises(BadRequest, match=r"must be a list of tensors|missing required input"):
        decode(body, None, BATCHED)
    with pytest.raises(BadRequest, match="the model takes any"):
        decode(body, None, OPEN)


ADDITIONAL = "unexpected additional input data for model '': "
CASES: list[tuple[Contract, list[Any], str]] = [
    (SINGLE, [7], "Unable to parse 'name': inputs[0] needs a name"),
    (SINGLE, [x(name=...)], "Unable to parse 'name': inputs[0] needs a name"),
    (BATCHED, [TEXT, x(name=1)], "Unable to parse 'name': inputs[1] needs a name"),
    (SINGLE, [X, X], "input 'x' already exists in request"),
    (BATCHED, [X], "expected 2 inputs but got 1 inputs for model ''. Got input(s) ['x'], but missing"),
    (BATCHED, [x(name="q")], "unexpected inference input 'q' for model '': it takes ['x', 'text']"),
    (SINGLE, [x(datatype="FP64")], "inference input 'x' data-type is 'FP64', but model '' expects 'FP32'"),
    (SINGLE, [x(datatype=...)], "Unable to parse 'datatype': input 'x' has None"),
    (SINGLE, [x(datatype=[])], "Unable to parse 'datatype': input 'x' has []"),
    (SINGLE, [x(shape=...)], "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got None"),
    (
        SINGLE,
        [x(shape=[1, -1])],
        "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got [1, -1]",
    ),
    (
        SINGLE,
        [x(shape=[1, 2.0])],
        "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got [1, 2.0]",
    ),
    (
        SINGLE,
        [x(shape=[True, 2])],
        "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got [True, 2]",
    ),
    (
        SINGLE,
        [x(shape="12")],
        "Unable to parse 'shape': input 'x': 'shape' must be a list of sizes, got '12'",
    ),
    (SINGLE, [x(shape=[1, 3])], "unexpected shape for input 'x' for model ''. Expected [-1,2], got [1,3]."),
    (SINGLE, [x(shape=[2])], "unexpected shape for input 'x' for model ''. Expected [-1,2], got [2]."),
    (SINGLE, [x(shape=[])], "unexpected shape for input 'x' for model ''. Expected [-1,2], got []."),
    (PLAIN, [x(shape=[2, 3])], "unexpected shape for input 'x' for model ''. Expected [-1,2], got [2,3]."),
    (
        SINGLE,
        [x(shape=[0, 2], data=[])],
        "inference request batch-size must be <= 8 for '': input 'x' has 0 rows",
    ),
    (
        SINGLE,
        [x(shape=[9, 2], data=[0] * 18)],
        "inference request batch-size must be <= 8 for '': input 'x' has 9 rows",
    ),
    (
        BATCHED,
        [X, TEXT | {"shape": [2, 1], "data": ["a", "b"]}],
        "input 'text' batch size does not match other inputs for '': this input has 2 rows",
    ),
    (SINGLE, [x(data=...)], "Input must set only one of the following fields: 'data', 'binary_data_size'"),
    (SINGLE, [x(data="12")], "Input must set only one of the following fields: 'data', 'binary_data_size'"),
    (SINGLE, [x(data=[1])], "input 'x': shape [1, 2] needs 2 elements, got 1"),
    (SINGLE, [x(data=[1, "a"])], "input 'x': data is not FP32: element 1 is 'a'; FP32 accepts numbers"),
    (SINGLE, [x(parameters=[])], "input 'x': 'parameters' must be an object"),
    (
        SINGLE,
        [x(data=..., parameters={"shared_memory_region": "r"})],
        "input 'x': a shared memory region needs",
    ),
    (
        SINGLE,
        [x(data=..., parameters={"binary_data_size": "8"})],
        "input 'x': binary_data_size must be a number of bytes, got '8'",
    ),
    (
        SINGLE,
        [x(data=..., parameters={"binary_data_size": -8})],
        "input 'x': binary_data_size must be a number of bytes, got -8",
    ),
    (
        SINGLE,
        [x(data=..., parameters={"binary_data_size": True})],
        "input 'x': binary_data_size must be a number of bytes, got True",
    ),
    (
        SINGLE,
        [x(data=..., parameters={"binary_data_size": 8})],
        "unexpected size for input 'x', expecting 8 additional bytes for model '': binary_data_size 8",
    ),
    (OPEN, [x(datatype="FP8")], "input 'x': unknown datatype 'FP8'; expected one of ['BF16', "),
    (OPEN, [x(datatype=...)], "input 'x': unknown datatype None; expected one of ['BF16', "),
    (OPEN, [x(datatype=["FP32"])], "input 'x': unknown datatype ['FP32']; expected one of ['BF16', "),
    (OPEN, [x(datatype={})], "input 'x': unknown datatype {}; expected one of ['BF16', "),
    (OPEN, [x(name="n" * 256)], "input 'nnn"),
    (OPEN, [x(shape=[0, 2**63], data=[])], "Unable to parse 'shape': input 'x'"),
    (OPEN, [x(shape=[1] * 256, data=[0])], "input 'x'"),
]


@pytest.mark.parametrize(("contract", "inputs", "message"), CASES, ids=range(len(CASES)))
def test_wrong_inputs(contract, inputs, message):
    told = refused(contract, *inputs)
    assert told.removeprefix("Unable to parse 'data': ").startswith(message)


TAILS: list[tuple[list[Any], bytes, str]] = [
    ([X], b"tail", ADDITIONAL + "got 4 bytes of binary data, but the inputs declare 0"),
    (
        [x(data=..., parameters={"binary_data_size": 8})],
        bytes(9),
        ADDITIONAL + "got 9 bytes of binary data, but the inputs declare 8",
    ),
    (
        [x(data=..., parameters={"binary_data_size": 4})],
        bytes(4),
        "input byte size mismatch for input 'x' for model ''. Expected 8, got 4: FP32 [1, 2]",
    ),
    (
        [x(data=..., parameters={"binary_data_size": 9})],
        bytes(8),
        "unexpected size for input 'x', expecting 1 additional bytes for model '': binary_data_size 9 goes "
        "past the end of the body",
    ),
]


@pytest.mark.parametrize(("inputs", "tail", "message"), TAILS, ids=range(len(TAILS)))
def test_wrong_binary_data(inputs, tail, message):
    assert refused(SINGLE, *inputs, tail=tail) == message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b"\5\0\0\0a",
            "input 'text': the BYTES data is malformed: element 0 is cut off: 4 bytes are missing",
        ),
        (b"\1\0\0", "input 'text': the BYTES data is malformed: the length of element 0 is cut off"),
        (pack_strings(["a"]), "input 'text': shape [1, 2] needs 2 elements, got 1"),
        (pack_strings(["a", "b", "c"]), "input 'text': shape [1, 2] needs 2 elements, got 3"),
    ],
)
def test_wrong_binary_strings(raw, message):
    text = {
        "name": "text",
        "datatype": "BYTES",
        "shape": [1, 2],
        "parameters": {"binary_data_size": len(raw)},
    }
    assert refused(BATCHED, X, text, tail=raw).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 7}, "'id' must be a string, got int"),
        ({"parameters": []}, "request: 'parameters' must be an object"),
        ({"parameters": {"sequence_id": -1}}, "parameter 'sequence_id' must be from 0 to 2**64 - 1"),
        ({"parameters": {"sequence_id": "a" * 129}}, "string correlation ID cannot be longer than 128"),
        ({"parameters": {"sequence_id": 1.5}}, "parameter 'sequence_id' must be a whole number or a string"),
        ({"parameters": {"sequence_id": True}}, "parameter 'sequence_id' must be a whole number or a string"),
        ({"parameters": {"sequence_id": 1, "sequence_end": 1}}, "parameter 'sequence_end' must be a boolean"),
        ({"parameters": {"shared_memory_offset": 0}}, "request: a shared memory region needs"),
        ({"outputs": {"name": "y"}}, "Unable to parse 'outputs': it must be a list"),
        ({"outputs": "y"}, "Unable to parse 'outputs': it must be a list"),
        ({"outputs": ["y"]}, "Unable to parse 'name': every requested output needs a name"),
        ({"outputs": [{"name": 1}]}, "Unable to parse 'name': every requested output needs a name"),
        ({"outputs": [{"name": "q"}]}, "unexpected inference output 'q' for model '': it returns ['y']"),
        ({"outputs": [{"name": "y", "parameters": 1}]}, "output 'y': 'parameters' must be an object"),
        ({"outputs": [{"name": "y"}] * 2}, "Duplicate output name 'y' is not allowed in a request"),
        (
            {"outputs": [{"name": "y", "parameters": {"classification": -3}}]},
            "invalid value for 'classification' parameter, expected >= 0: output 'y' has -3",
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "output 'y': a shared memory region needs",
        ),
    ],
)
def test_wrong_fields(fields, message):
    assert refused(SINGLE, X, **fields).startswith(message)


def test_a_long_name_of_an_output_is_refused():
    assert refused(OPEN, X, outputs=[{"name": "y" * 256}]).startswith("output 'yyy")


def test_what_is_no_number_is_taken_as_triton_takes_it():
    body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [NaN, -Infinity]}]}'
    assert decode(body, None, SINGLE).data == [struct.pack("<2f", float("nan"), float("-inf"))]


def test_classes():
    got = ask(SINGLE, X, outputs=[{"name": "y", "parameters": {"classification": 3}}])
    assert got.wanted == (WantedOutput("y", False, 3),)
    assert read_call_key(got.key).outputs == ("y",), "the model is not asked for classes"


HALF = Contract(Signature(inputs=[spec("x", "FP32", 2)], outputs=[spec("h", "BF16")], max_batch_size=8))


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "h"}]}, False),
        ({"outputs": [{"name": "h", "parameters": {"binary_data": True}}]}, True),
        (
            {
                "outputs": [{"name": "h", "parameters": {"binary_data": False}}],
                "parameters": {"binary_data_output": True},
            },
            False,
        ),
    ],
)
def test_half_floats_that_are_asked_for_as_json_are_refused_before_the_model_runs(fields, taken):
    if taken:
        assert ask(HALF, X, **fields).rows == 1
    else:
        assert refused(HALF, X, **fields).startswith("output 'h': BF16 and FP16 cannot be sent as JSON")
