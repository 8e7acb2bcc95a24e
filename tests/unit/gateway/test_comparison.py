"""Two answers to one request: numbers within a tolerance, the top class, and strings by edit distance."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.comparison import Comparison, Output, compare
from services.gateway.domain.edit_distance import edit_distance
from tidegate.kernel.protocol.envelope import tensor
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings

pytestmark = pytest.mark.unit


def numbers(values: object, datatype: str = "FP32", name: str = "y") -> Output:
    """An output whose first axis is the batch."""
    array = np.array(values, DATATYPES[datatype].numpy)
    return Output(tensor(name, datatype, array.shape[1:]), array.shape[0], array.tobytes())


def texts(*values: str, name: str = "t") -> Output:
    return Output(tensor(name, "BYTES", ()), len(values), pack_strings(list(values)))


def one(a: Output, b: Output, atol: float = 1e-6, rtol: float = 1e-4) -> Comparison:
    (found,) = compare([a], [b], atol, rtol)
    return found


@pytest.mark.parametrize(
    ("a", "b", "agrees"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], True),
        ([[1.0, 2.0]], [[1.00009, 2.0]], True),
        ([[1.0, 2.0]], [[1.0002, 2.0]], False),
        ([[nan, inf, -inf]], [[nan, inf, -inf]], True),
        ([[nan, 1.0]], [[1.0, 1.0]], False),
        ([[inf, 1.0]], [[-inf, 1.0]], False),
        ([[1.0, 1.0]], [[inf, 1.0]], False),
    ],
)
def test_numbers_agree_within_the_tolerance(a, b, agrees):
    found = one(numbers(a), numbers(b))
    assert (bool(found.counts.agreed), found.difference == "") == (agrees, agrees)
    assert found.counts.max_abs < inf, "JSON has no infinite number"


def test_the_largest_differences_and_the_place_are_reported():
    found = one(numbers([[1.0, 10.0, 4.0]]), numbers([[1.5, 10.0, 5.0]]))
    assert (found.counts.max_abs, found.counts.max_rel) == (1.0, 0.5)
    assert found.difference == "2 of 3 values differ, at most by 1 (element 2)"


def test_the_tolerance_is_relative_to_the_primary():
    assert one(numbers([[100.0]]), numbers([[101.0]]), rtol=0.0100001).counts.agreed
    assert not one(numbers([[1.0]]), numbers([[100.0]]), rtol=0.5).counts.agreed


def test_scores_count_by_their_largest_class_even_if_the_numbers_differ():
    a = numbers([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]])
    b = numbers([[0.3, 0.7], [0.4, 0.6], [0.7, 0.3]])
    counts = one(a, b).counts
    assert (counts.agreed, counts.rows, counts.top1) == (0, 3, 2)


@pytest.mark.parametrize("output", [numbers([[1], [2]], "INT64"), numbers([[1.0], [2.0]])])
def test_whole_numbers_and_single_values_have_no_top_class(output):
    assert one(output, output).counts.rows == 0


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (numbers([[1.0]]), numbers([[1.0]], "FP64"), "FP64 [1, 1] instead of FP32 [1, 1]"),
        (numbers([[1.0]]), numbers([[1.0, 2.0]]), "FP32 [1, 2] instead of FP32 [1, 1]"),
    ],
)
def test_other_shapes_and_datatypes_are_unlike(a, b, told):
    found = one(a, b)
    assert (found.counts.unlike, found.counts.agreed, found.difference) == (1, 0, told)


def test_a_missing_output_is_named():
    found = compare([numbers([[1.0]], name="a")], [numbers([[1.0]], name="b")], 0, 0)
    assert [(each.name, each.difference) for each in found] == [
        ("a", "the shadow's answer does not have this output"),
        ("b", "only the shadow's answer has this output"),
    ]


def test_strings_count_exactly_and_by_edit_distance():
    found = one(texts("kitten", "same", "x"), texts("sitting", "same", "x"))
    assert (found.counts.texts, found.counts.exact, found.counts.agreed) == (3, 2, 0)
    assert found.counts.edits == pytest.approx(3 / 7)
    assert found.difference == "1 of 3 strings differ, edit distance 43%"


def test_long_strings_have_no_edit_distance():
    found = one(texts("a" * 3000), texts("b" * 3000))
    assert (found.counts.edited, found.difference) == (0, "1 of 1 strings differ")


def slow_distance(a: str, b: str) -> int:
    """The textbook's table (Wagner and Fischer)."""
    row = list(range(len(b) + 1))
    for at, x in enumerate(a, 1):
        before, row = row, [at]
        for to, y in enumerate(b, 1):
            row.append(min(before[to] + 1, row[-1] + 1, before[to - 1] + (x != y)))
    return row[-1]


@given(st.text("abc", max_size=20), st.text("abc", max_size=20))
def test_the_edit_distance_equals_the_textbooks(a, b):
    assert edit_distance(a, b) == slow_distance(a, b)
