"""Outputs as classes, in Triton's words: what it answered to the same values."""

from __future__ import annotations

import numpy as np
import pytest

from services.gateway.domain.classification import classified, top
from services.gateway.domain.contract import Decoded, WantedOutput
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import tensor
from tidegate.kernel.protocol.tensors import DATATYPES, unpack_strings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("datatype", "values", "count", "shown"),
    [
        ("FP32", [[0.5, 0.5, 3], [3, 0.5, 0.5]], 1, [["3.000000:2"], ["3.000000:0"]]),
        (
            "FP32",
            [[0.5, 0.5, 3], [3, 0.5, 0.5]],
            5,
            [["3.000000:2", "0.500000:0", "0.500000:1"], ["3.000000:0", "0.500000:1", "0.500000:2"]],
        ),
        ("INT32", [[7, -2, 7]], 2, [["7:0", "7:2"]]),
        ("UINT8", [[1, 200, 3]], 3, [["200:1", "3:2", "1:0"]]),
        ("FP64", [[0.1, 0.25, 1e30]], 1, [["1000000000000000019884624838656.000000:2"]]),
        ("UINT64", [[2**64 - 1, 0]], 1, [["18446744073709551615:0"]]),
    ],
)
def test_top(datatype, values, count, shown):
    raw = np.array(values, DATATYPES[datatype].numpy).tobytes()
    found, packed = top(tensor("y", datatype, (len(values[0]),)), len(values), raw, count)
    assert (found.datatype.name, found.dims) == ("BYTES", (len(shown[0]),))
    assert [e.decode() for e in unpack_strings(packed)] == [element for row in shown for element in row]


def test_all_dims_of_a_row_are_one_list_of_classes_and_labels_follow():
    raw = np.array([[1, 2], [3, 4]], "<f4").tobytes()
    found, packed = top(tensor("y", "FP32", (2, 2)), 0, raw, 3, ["a", "b", "c"])
    assert (found.dims, unpack_strings(packed)) == ((3,), [b"4.000000:3", b"3.000000:2:c", b"2.000000:1:b"])


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES", "FP16", "BF16"])
def test_what_has_no_classes(datatype):
    with pytest.raises(BadRequest, match=f"unsupported type '{datatype}'"):
        top(tensor("y", datatype, (2,)), 1, b"\0\0\0\0", 1)


def test_only_what_was_asked_for_changes():
    wanted = (WantedOutput("a", True), WantedOutput("b", True, 1))
    outputs = (tensor("a", "INT32", (2,)), tensor("b", "INT32", (2,)))
    raw = np.array([1, 2], "<i4").tobytes()
    shown, data = classified(Decoded("", 1, b"", [], wanted, True), 1, outputs, [raw, raw], {"b": ["x", "y"]})
    assert (shown[0], data[0]) == (outputs[0], raw)
    assert unpack_strings(data[1]) == [b"2:1:y"]
