"""Answers that contradict the signature are noticed, whatever answers came before."""

from __future__ import annotations

import pytest

from services.worker.domain import output_check
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.split import Output
from tidegate.kernel.protocol.models import Signature, TensorSpec

X = [TensorSpec(name="x", datatype="FP32", shape=[4])]


def check(*outputs: TensorSpec, max_batch: int = 8) -> OutputCheck:
    return OutputCheck(Signature(inputs=X, outputs=list(outputs), max_batch_size=max_batch))


def spec(shape: list[int], datatype: str = "FP32", name: str = "y") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "datatype": datatype, "shape": shape})


def output(*shape: int, datatype: str = "FP32", name: str = "y") -> Output:
    return Output(name, datatype, shape, b"")


def test_what_agrees_is_not_counted():
    found = check(spec([4]), spec([], "BYTES", "label"))
    for rows in (1, 3, 1):
        assert found.agrees([output(rows, 4), output(rows, datatype="BYTES", name="label")], rows)
    assert (found.count, found.last) == (0, "")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (output(2, 4, datatype="FP64"), r"'y' is FP64 \[2, 4\], but the signature says FP32 \[2, 4\]"),
        (output(2, 99), r"'y' is FP32 \[2, 99\], but the signature says FP32 \[2, 4\]"),
        (output(2), r"'y' is FP32 \[2\]"),
        (output(2, 4, 1), r"'y' is FP32 \[2, 4, 1\]"),
        (output(), r"'y' is FP32 \[\]"),
        (output(5, 4), r"'y' is FP32 \[5, 4\], but the signature says FP32 \[2, 4\]"),
    ],
)
def test_what_contradicts_is_counted_also_after_good_answers(wrong, words):
    found = check(spec([4]))
    assert found.agrees([output(2, 4)], 2)
    for times in (1, 2):
        assert not found.agrees([wrong], 2)
        assert found.count == times
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.last)
    assert found.agrees([output(2, 4)], 2)


def test_any_size_and_no_batch_axis():
    found = check(spec([-1, 3]), max_batch=0)
    assert found.agrees([output(7, 3)], 0)
    assert found.agrees([output(9, 3)], 0)
    assert not found.agrees([output(9, 4)], 0)


def test_one_answer_of_a_stream_may_have_any_number_of_rows():
    found = check(spec([4]))
    assert found.agrees([output(3, 4)], 0)
    assert not found.agrees([output(3, 5)], 0)


def test_a_scalar_for_each_row_that_comes_without_rows():
    found = check(spec([]))
    assert found.agrees([output(2)], 2)
    assert not found.agrees([output()], 2)


def test_outputs_beyond_the_signature_are_not_judged_and_missing_ones_are_named():
    found = check(spec([4]))
    assert found.agrees([output(1, 4), output(9, name="more")], 1)
    assert found.missing([output(1, 4)]) == ""
    assert found.missing([output(1, 4, name="z")]) == "the output 'y' is missing"


def test_ever_new_shapes_take_no_more_memory(monkeypatch):
    monkeypatch.setattr(output_check, "KEPT", 10)
    found = check(spec([-1]))
    assert all(found.agrees([output(1, size)], 1) for size in range(100))
    assert len(found._agreed) <= 10


def test_what_is_told_counts_in_words():
    found = check(spec([4]))
    assert found.summary == ""
    found.agrees([output(1, 5)], 1)
    assert found.summary.startswith("1 answer contradicts the signature: the output 'y'")
    found.agrees([output(1, 5)], 1)
    assert found.summary.startswith("2 answers contradict the signature: ")
