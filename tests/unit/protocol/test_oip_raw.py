"""Requests whose whole body is the data of the only input: what the signature makes of them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.oip import decode
from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol.envelope import Buffer, read_call_key
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.unit

STRING = "For BYTE datatype raw input 'x', the model must have input shape [1]: "


def spec(name: str, datatype: Any, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=list(shape), optional=optional)


def takes(*inputs: TensorSpec, batch: int = 0) -> Contract:
    # FP16 cannot be sent as JSON, so its being taken says that nobody wants to.
    outputs = [spec("y", "FP32", 1), spec("h", "FP16", 1)]
    return Contract(Signature(inputs=list(inputs), outputs=outputs, max_batch_size=batch))


def only(datatype: Any, *shape: int, batch: int = 0, optional: bool = False) -> Contract:
    return takes(spec("x", datatype, *shape, optional=optional), batch=batch)


def raw(contract: Contract, body: Buffer) -> Decoded:
    return decode(body, 0, contract)


@pytest.mark.parametrize(
    ("contract", "body", "dims", "rows"),
    [
        (only("FP32", 2), bytes(8), (2,), 0),
        (only("FP32", 2, batch=4), bytes(8), (2,), 1),
        (only("FP32", 2, optional=True), bytes(8), (2,), 0),
        (only("FP32"), bytes(4), (), 0),
        (only("FP32", -1), bytes(12), (3,), 0),
        (only("INT16", 3, -1, 2, batch=4), bytes(24), (3, 2, 2), 1),
        (only("UINT8", -1), b"", (0,), 0),
        (only("FP32", -1, 0), b"", (0, 0), 0),
        (only("FP16", 2), bytes(4), (2,), 0),
    ],
)
def test_a_body(contract, body, dims, rows):
    got = raw(contract, body)
    assert (got.id, got.rows, got.wanted, got.binary) == ("", rows, None, True)
    assert [bytes(d) for d in got.data] == [body]
    key = read_call_key(got.key)
    datatype = contract.inputs["x"][1].datatype.name
    assert [(t.name, t.datatype.name, t.dims) for t in key.inputs] == [("x", datatype, dims)]
    assert (key.outputs, key.parameters) == ((), {})


@pytest.mark.parametrize("body", [b"", b"a", "größe\0".encode(), b"\xff" * 300])
@pytest.mark.parametrize(
    ("contract", "dims"),
    [
        (only("BYTES", 1), (1,)),
        (only("BYTES", 1, batch=4), (1,)),
        (only("BYTES", 1, 1), (1, 1)),
        (only("BYTES", batch=4), ()),
    ],
)
def test_of_bytes_it_is_one_element(contract, dims, body):
    for given in (body, memoryview(bytearray(body))):
        got = raw(contract, given)
        assert got.data == [pack_strings([body])]
        assert read_call_key(got.key).inputs[0].dims == dims


def test_its_data_is_not_copied():
    body = bytearray(8)
    (data,) = raw(only("FP32", 2), memoryview(body)).data
    body[0] = 7
    assert bytes(data) == bytes(body)


def test_it_shares_calls_with_requests_that_say_what_they_are():
    contract = only("FP32", 2, batch=4)
    said = {"name": "x", "datatype": "FP32", "shape": [3, 2], "data": [0] * 6}
    head = {"inputs": [said], "parameters": {"binary_data_output": True}}
    assert raw(contract, bytes(8)).key == decode(orjson.dumps(head), None, contract).key


@pytest.mark.parametrize(
    ("contract", "body", "message"),
    [
        (
            takes(spec("x", "FP32", 2), spec("z", "FP32", 2, optional=True)),
            bytes(8),
            "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in '' model "
            "configuration: Inference-Header-Content-Length is 0, so the body must be the only input, "
            "but the model takes ['x', 'z']",
        ),
        (only("FP32", 2), bytes(9), "input 'x': FP32 [2] needs 8 bytes, got 9"),
        (only("FP32", 2), b"", "input 'x': FP32 [2] needs 8 bytes, got 0"),
        (only("FP32", 2, batch=4), bytes(16), "input 'x': FP32 [1, 2] needs 8 bytes, got 16"),
        (only("FP32", -1), bytes(5), "input 'x': FP32 [-1] needs a multiple of 4 bytes, got 5"),
        (
            only("FP32", -1, 2, batch=4),
            bytes(12),
            "input 'x': FP32 [1, -1, 2] needs a multiple of 8 bytes, got 12",
        ),
        (only("FP32", -1, 0), bytes(4), "input 'x': FP32 [-1, 0] needs a multiple of 0 bytes, got 4"),
        (
            only("FP32", -1, -1),
            bytes(4),
            "The shape of the raw input 'x' can not be deduced because there are more than one "
            "variable-sized dimension: a raw body can determine only one variable dimension (-1), "
            "but [-1, -1] has more",
        ),
        (
            only("BYTES", -1, -1),
            b"a",
            "The shape of the raw input 'x' can not be deduced because there are more than one "
            "variable-sized dimension: a raw body can determine only one variable dimension (-1), "
            "but [-1, -1] has more",
        ),
        (only("BYTES", 2), b"a", STRING + "a raw body is one element of BYTES, but the shape is [2]"),
        (
            only("BYTES", -1, batch=4),
            b"a",
            STRING + "a raw body is one element of BYTES, but the shape is [1, -1]",
        ),
    ],
)
def test_what_no_shape_can_be_made_of(contract, body, message):
    with pytest.raises(BadRequest) as caught:
        raw(contract, body)
    assert caught.value.message == message


def test_without_a_signature_nobody_knows_what_it_is():
    with pytest.raises(Unavailable) as caught:
        raw(Contract(None), bytes(8))
    assert caught.value.message == "the model's inputs are not known until the first replica is ready"
    assert caught.value.retry_after_s
