"""The generate extension: inputs by name, outputs by name."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest

from services.gateway.domain import generate
from services.gateway.domain.contract import Contract
from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol.envelope import read_call_key, tensor
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = pytest.mark.unit

TEXT = {
    "inputs": [
        {"name": "text_input", "datatype": "BYTES", "shape": [1]},
        {"name": "max_tokens", "datatype": "INT32", "shape": [1], "optional": True},
        {"name": "stop", "datatype": "BYTES", "shape": [-1], "optional": True},
        {"name": "grid", "datatype": "FP32", "shape": [-1, 2], "optional": True},
        {"name": "do_sample", "datatype": "BOOL", "shape": [1], "optional": True},
    ],
    "outputs": [{"name": "text_output", "datatype": "BYTES", "shape": [1]}],
}


def contract(**given: Any) -> Contract:
    return Contract(Signature.model_validate(TEXT | given))


def decode(body: Any, **given: Any):
    return generate.decode(orjson.dumps(body), contract(**given))


def test_scalars_and_lists():
    found = decode(
        {"stop": ["a", "ü"], "text_input": "hello", "max_tokens": 7, "grid": [[1, 2], [3, 4]], "id": "x",
         "do_sample": True}
    )  # fmt: skip
    key = read_call_key(found.key)
    assert [(t.name, t.dims) for t in key.inputs] == [
        ("text_input", (1,)), ("max_tokens", (1,)), ("stop", (2,)), ("grid", (2, 2)), ("do_sample", (1,)),
    ]  # fmt: skip
    text, tokens, stop, grid, sample = map(bytes, found.data)
    assert (unpack_strings(text), struct.unpack("<i", tokens)) == ([b"hello"], (7,))
    assert (unpack_strings(stop), struct.unpack("<4f", grid)) == ([b"a", "ü".encode()], (1, 2, 3, 4))
    assert sample == b"\1"
    assert (found.id, found.rows, found.wanted, key.outputs) == ("x", 0, None, ())


def test_a_batch_axis_of_one():
    found = decode({"text_input": "hello", "stop": []}, max_batch_size=8)
    assert found.rows == 1
    assert [t.dims for t in read_call_key(found.key).inputs] == [(1,), (0,)]


def test_parameters():
    found = decode(
        {
            "text_input": "a",
            "parameters": {"temperature": 0.5, "timeout": 2000, "x": 1},
            "stream": True,
            "x": 2,
        }
    )
    assert read_call_key(found.key).parameters == {"temperature": 0.5, "stream": True, "x": 1}
    assert found.timeout_ms == 2.0


@pytest.mark.parametrize(
    ("dims", "value", "shape"),
    [
        ((1,), 7, [1]),
        ((1,), [7], [1]),
        ((1,), [[7]], [1]),
        ((), 7, []),
        ((), [7], []),
        ((-1,), 7, [1]),
        ((-1,), [1, 2, 3], [3]),
        ((-1,), [], [0]),
        ((2, 3), [1, 2, 3, 4, 5, 6], [2, 3]),
        ((2, 3), [[1, 2, 3], [4, 5, 6]], [2, 3]),
        ((-1, 3), [1, 2, 3, 4, 5, 6], [2, 3]),
        ((-1, -1), [[1, 2, 3], [4, 5, 6]], [2, 3]),
        ((-1, 2, -1), [1, 2], [1, 2, 1]),
    ],
)
def test_shapes(dims, value, shape):
    assert generate.fitting("x", dims, value) == shape


@pytest.mark.parametrize(
    ("dims", "value"),
    [((1,), [1, 2]), ((2,), 1), ((-1, 2), [1, 2, 3]), ((-1, -1), [1, 2]), ((), [1, 2]), ((-1, 0), [1])],
)
def test_values_that_do_not_fit_the_shape(dims, value):
    with pytest.raises(BadRequest, match="cannot fill the shape"):
        generate.fitting("x", dims, value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "failed to parse the request JSON buffer: the request is not JSON"),
        (b"7", "must be a JSON object"),
        (
            b"{}",
            r"expected 1 inputs but got 0 inputs for .*missing required input\(s\) \['text_input'\]",
        ),
        (b'{"text_input": null}', "data is not BYTES"),
        (b'{"text_input": {"a": 1}}', "data is not BYTES"),
        (b'{"text_input": "a", "max_tokens": 3000000000}', "data is not INT32"),
        (b'{"text_input": "a", "grid": [[1, 2], [3]]}', "needs 4 elements, got 3"),
        (b'{"text_input": "a", "sequence_id": -7}', "parameter 'sequence_id' must be from 0"),
        (b'{"text_input": "a", "unknown": [1]}', "parameter 'unknown' has invalid type"),
        (b'{"text_input": "a", "id": 1}', "'id' must be a string"),
        (b'{"text_input": "a", "parameters": []}', "'parameters' must be an object"),
    ],
)
def test_error_messages(body, told):
    with pytest.raises(BadRequest, match=told):
        generate.decode(body, contract())


def test_a_signature_is_required():
    with pytest.raises(Unavailable) as caught:
        generate.decode(b"{}", Contract(None))
    assert caught.value.retry_after_s


@pytest.mark.parametrize(
    ("datatype", "raw", "shown"),
    [
        ("BYTES", pack_strings(["wörld"]), "wörld"),
        ("BYTES", pack_strings([b"\xff\xfe"]), "��"),
        ("BYTES", pack_strings(["a", "b"]), ["a", "b"]),
        ("FP32", struct.pack("<f", 0.5), 0.5),
        ("FP16", np.array([0.5, 1.5], "<f2").tobytes(), [0.5, 1.5]),
        ("BF16", b"\x80\x3f", 1.0),
        ("INT64", struct.pack("<2q", -1, 2**40), [-1, 2**40]),
        ("BOOL", b"\1", True),
        ("FP64", b"", []),
    ],
)
def test_outputs(datatype, raw, shown):
    answer = generate.encode("m", "3", "id7", [tensor("y", datatype, (-1,))], {"took": 1}, [raw])
    assert orjson.loads(answer) == {
        "id": "id7", "model_name": "m", "model_version": "3", "took": 1, "y": shown,
    }  # fmt: skip
    assert b'"id"' not in generate.encode("m", "3", "", [], {}, [])
