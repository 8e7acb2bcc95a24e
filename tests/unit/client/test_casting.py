"""A cast changes no value, or is refused with what the model expects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tidegate.client.casting import fit
from tidegate.client.codec import dtype_of
from tidegate.client.core import arrange
from tidegate.kernel.protocol.tensors import DATATYPES

NUMERIC = sorted(set(DATATYPES) - {"BYTES", "BF16"})


@given(
    st.sampled_from(NUMERIC).flatmap(lambda d: npst.arrays(dtype_of(d), npst.array_shapes(max_side=4))),
    st.sampled_from(NUMERIC),
)
def test_whatever_is_cast_has_the_same_values(array: Any, datatype: str) -> None:
    try:
        found, sent_as = fit("x", array, datatype)
    except TypeError:
        return  # that refusals are right, and say why, is tested below
    assert sent_as == datatype
    assert found.dtype == dtype_of(datatype)
    if array.dtype == np.float64:
        np.testing.assert_array_equal(found, array.astype(found.dtype))
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(array))
    elif array.dtype.kind == "f":
        np.testing.assert_array_equal(found.astype(np.float64), array.astype(np.float64))
    else:
        assert [int(v) for v in found.ravel().tolist()] == [int(v) for v in array.ravel().tolist()]


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([1, 2]), "FP32"),
        (np.array([255]), "UINT8"),
        (np.array([2**53]), "FP64"),
        (np.array([True]), "INT8"),
        (np.array([0.1], np.float32), "FP64"),
        (np.array([1], ">i4"), "INT32"),
    ],
)
def test_lossless(array: Any, datatype: str) -> None:
    found, _ = fit("x", array, datatype)
    assert found.dtype == dtype_of(datatype)


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.array([0.5], np.float32), "FP16"),
        (np.array([1e300]), "FP32"),
        (np.array([0.5]), "INT64"),
        (np.array([0.5], np.float32), "INT64"),
        (np.array([256]), "UINT8"),
        (np.array([-1]), "UINT64"),
        (np.array([2**53 + 1]), "FP64"),
        (np.array([2**63 - 1]), "FP32"),
        (np.array([1]), "BOOL"),
        (np.array([1]), "BYTES"),
        (np.array(["1"]), "INT64"),
    ],
)
def test_lossy_is_refused(array: Any, datatype: str) -> None:
    with pytest.raises(TypeError, match=f"'x': the model expects {datatype} "):
        fit("x", array, datatype)


def test_refusal_names_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"got float64, .*: \.astype\(np\.int64\)"):
        fit("x", np.array([0.5]), "INT64")


def test_lists_of_floats_become_what_the_model_takes() -> None:
    found, _ = fit("x", [[0.1, 0.2]], "FP32")
    assert found.dtype == np.float32
    assert found.shape == (1, 2)
    with pytest.raises(TypeError, match="FP16"):
        fit("x", [1e6], "FP16")


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
def test_arrays_of_float64_are_rounded_as_lists_are(datatype: str) -> None:
    values = [[0.1, -2.5, float("inf"), float("nan")]]
    from_array, sent_as = fit("x", np.array(values), datatype)
    from_list, _ = fit("x", values, datatype)
    assert sent_as == datatype
    assert from_array.dtype == dtype_of(datatype)
    np.testing.assert_array_equal(from_array, from_list)


def test_lists_of_strings_keep_their_trailing_zeros() -> None:
    found, datatype = fit("x", [b"a\0", b"b"], None)
    assert datatype == "BYTES"
    assert found.tolist() == [b"a\0", b"b"]


@pytest.mark.parametrize(("value", "datatype"), [([1.5], "FP32"), ([1], "INT64"), (["a"], "BYTES")])
def test_without_a_signature_the_array_decides(value: Any, datatype: str) -> None:
    assert fit("x", value, None)[1] == datatype


@pytest.mark.parametrize("value", [[[1], [1, 2]], [object()], {"a": 1}, [None]])
def test_what_is_no_tensor_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="input 'x'"):
        fit("x", value, None)


def test_a_single_value_is_an_array_of_one_where_the_model_takes_one_axis() -> None:
    def shape(value: Any, expected: list[int]) -> tuple[int, ...]:
        inputs = [{"name": "x", "datatype": "FP32", "shape": expected}]
        (tensor,) = arrange("m", {"x": value}, {"inputs": inputs})
        return tensor.array.shape

    assert [shape(2.5, [1]), shape(2.5, [-1])] == [(1,), (1,)]
    assert shape(2.5, [-1, 1]) == ()
    assert shape([2.5], [1]) == (1,)
