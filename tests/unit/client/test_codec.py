"""Every datatype goes to bytes and comes back the same, in whatever shape."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tidegate.client import codec
from tidegate.client.codec import Tensor
from tidegate.kernel.protocol.tensors import DATATYPES

NUMERIC = sorted(set(DATATYPES) - {"BYTES", "BF16"})
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def numeric(draw: Any) -> Tensor:
    """A tensor of any numeric datatype, shape and value, NaN and infinities included."""
    datatype = draw(st.sampled_from(NUMERIC))
    array = draw(npst.arrays(codec.dtype_of(datatype), SHAPES))
    return Tensor("x", datatype, array)


@st.composite
def strings(draw: Any) -> Tensor:
    """A BYTES tensor; numpy would cut trailing zeros off fixed-width strings, so they are likely here."""
    shape = draw(SHAPES)
    size = int(np.prod(shape))
    values = draw(
        st.lists(st.binary(max_size=9).map(lambda b: b + b"\0") | st.binary(), min_size=size, max_size=size)
    )
    array = np.empty(size, dtype=object)
    array[:] = values
    return Tensor("s", "BYTES", array.reshape(shape))


def as_response(tensors: list[Tensor]) -> tuple[bytes, int]:
    """The binary response that gives back these tensors."""
    blobs = [codec.to_raw(t.array, t.datatype) for t in tensors]
    outputs = [
        {
            "name": t.name,
            "datatype": t.datatype,
            "shape": list(t.array.shape),
            "parameters": {"binary_data_size": len(blob)},
        }
        for t, blob in zip(tensors, blobs, strict=True)
    ]
    head = orjson.dumps({"model_name": "m", "outputs": outputs})
    return head + b"".join(blobs), len(head)


@given(numeric() | strings())
def test_round_trip(tensor: Tensor) -> None:
    _, arrays = codec.decode_response(*as_response([tensor]))
    back = arrays[tensor.name]
    assert back.shape == tensor.array.shape
    assert back.dtype == tensor.array.dtype
    if tensor.datatype == "BYTES":
        assert back.ravel().tolist() == tensor.array.ravel().tolist()
    else:
        np.testing.assert_array_equal(back, tensor.array)
    assert back.flags.writeable


@given(st.lists(numeric() | strings(), min_size=1, max_size=4))
def test_many_tensors_follow_each_other(tensors: list[Tensor]) -> None:
    named = [Tensor(f"t{i}", t.datatype, t.array) for i, t in enumerate(tensors)]
    _, arrays = codec.decode_response(*as_response(named))
    assert list(arrays) == [t.name for t in named]
    for tensor in named:
        assert codec.to_raw(arrays[tensor.name], tensor.datatype) == codec.to_raw(
            tensor.array, tensor.datatype
        )


@given(npst.arrays(np.float32, SHAPES))
def test_bf16_is_rounded_to_the_nearest(array: Any) -> None:
    back = codec.from_raw(codec.to_raw(array, "BF16"), "BF16", array.shape)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(back), np.isnan(array))
    # 8 bits of mantissa: half a unit in the last place, which for subnormals is a constant.
    with np.errstate(all="ignore"):
        small = np.isfinite(array) & (np.abs(array) < 3e38)
        error = np.abs(back[small] - array[small])
        assert np.all(error <= np.maximum(np.abs(array[small]) * 2.0**-8, 2.0**-134))
    again = codec.from_raw(codec.to_raw(back, "BF16"), "BF16", array.shape)
    np.testing.assert_array_equal(again, back)


@pytest.mark.parametrize(
    ("value", "bits"),
    [(1.0, 0x3F80), (-2.0, 0xC000), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (float("inf"), 0x7F80)],
)
def test_bf16_bits_ties_go_to_even(value: float, bits: int) -> None:
    assert codec.to_raw(np.array([value], np.float32), "BF16") == struct.pack("<H", bits)


def test_layout_of_bytes_and_text() -> None:
    array = np.array(["é", b"\0\1"], dtype=object)
    assert codec.to_raw(array, "BYTES") == b"\2\0\0\0\xc3\xa9" + b"\2\0\0\0\0\1"


def test_non_contiguous_and_big_endian_arrays_are_sent_in_row_major_little_endian() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert codec.to_raw(array, "INT32") == struct.pack("<6i", 0, 3, 1, 4, 2, 5)
    assert codec.datatype_of(array) == "INT32"


def test_request_asks_for_all_outputs_in_binary() -> None:
    body, length = codec.encode_request(
        [Tensor("x", "FP32", np.zeros((1, 2), np.float32))], request_id="r", parameters={"p": 1}
    )
    assert orjson.loads(body[:length]) == {
        "id": "r",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}],
        "parameters": {"p": 1, "binary_data_output": True},
    }
    assert body[length:] == bytes(8)


def test_request_names_wanted_outputs() -> None:
    body, length = codec.encode_request([], outputs=["a"])
    assert orjson.loads(body[:length])["outputs"] == [{"name": "a", "parameters": {"binary_data": True}}]


def test_json_outputs_are_read_too() -> None:
    head = {
        "outputs": [
            {"name": "a", "datatype": "FP32", "shape": [2, 1], "data": [1, 2.5]},
            {"name": "b", "datatype": "BYTES", "shape": [2], "data": ["x", "é"]},
            {"name": "c", "datatype": "BOOL", "shape": [1], "data": [True]},
        ]
    }
    _, arrays = codec.decode_response(orjson.dumps(head), None)
    assert arrays["a"].dtype == np.float32
    assert arrays["a"].tolist() == [[1.0], [2.5]]
    assert arrays["b"].tolist() == [b"x", "é".encode()]
    assert arrays["c"].dtype == np.bool_


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"{}", 3),
        (b"[]", None),
        (b"{", None),
        (b"{}x", 2),
        (orjson.dumps({"outputs": [{"name": "a"}]}), None),
        (orjson.dumps({"outputs": [3]}), None),
        (orjson.dumps({"outputs": [{"name": "a", "datatype": "NOPE", "shape": [1], "data": [1]}]}), None),
        (orjson.dumps({"outputs": [{"name": "a", "datatype": "FP32", "shape": [3], "data": [1]}]}), None),
    ],
)
def test_malformed_responses_are_value_errors(body: bytes, length: int | None) -> None:
    with pytest.raises(ValueError):
        codec.decode_response(body, length)


@given(numeric() | strings(), st.integers(1, 4))
def test_cut_off_responses_are_value_errors(tensor: Tensor, cut: int) -> None:
    body, length = as_response([tensor])
    if len(body) - length >= cut:
        with pytest.raises(ValueError):
            codec.decode_response(body[:-cut], length)


def test_what_cannot_be_sent_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="complex128 cannot be sent"):
        codec.datatype_of(np.array([1j]))
