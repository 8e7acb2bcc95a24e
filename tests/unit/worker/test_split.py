"""A batched answer is split: each request gets its own rows, byte for byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.domain.split import Output, RowMismatch, describe, split, split_parameters
from tidegate.kernel.protocol.tensors import DATATYPES, elements, pack_strings

pytestmark = pytest.mark.unit

partitions = st.lists(st.integers(1, 5), min_size=1, max_size=8)
dims = st.lists(st.integers(0, 3), max_size=2).map(tuple)
FIXED = sorted(name for name, datatype in DATATYPES.items() if datatype.size)


@st.composite
def batches(draw):
    """Draw parts, the outputs of the batch, and the expected slices of each part."""
    parts = draw(partitions)
    outputs: list[Output] = []
    expected: list[list[bytes]] = [[] for _ in parts]
    for at in range(draw(st.integers(1, 3))):
        datatype, shape = draw(st.sampled_from([*FIXED, "BYTES", "BYTES"])), draw(dims)
        per_row = elements(list(shape))
        pieces = []
        for answer, rows in zip(expected, parts, strict=True):
            if datatype == "BYTES":
                count = rows * per_row
                piece = pack_strings(draw(st.lists(st.binary(max_size=4), min_size=count, max_size=count)))
            else:
                size = rows * per_row * DATATYPES[datatype].size
                piece = draw(st.binary(min_size=size, max_size=size))
            answer.append(piece)
            pieces.append(piece)
        outputs.append(Output(f"o{at}", datatype, (sum(parts), *shape), b"".join(pieces)))
    return parts, outputs, expected


@given(batches())
def test_each_part_gets_its_rows(batch):
    parts, outputs, expected = batch
    found = split(outputs, parts)
    assert [[bytes(piece) for piece in answer] for answer in found] == expected


@given(batches())
def test_nothing_is_copied_and_nothing_is_lost(batch):
    parts, outputs, _ = batch
    for at, output in enumerate(outputs):
        pieces = [answer[at] for answer in split(outputs, parts)]
        assert all(isinstance(piece, memoryview) for piece in pieces)
        assert b"".join(pieces) == output.raw


def test_rows_of_strings_of_any_length():
    raw = pack_strings(["a", "", "größe", "b" * 300])
    found = split([Output("t", "BYTES", (2, 2), raw)], [1, 1])
    assert [bytes(answer[0]) for answer in found] == [
        pack_strings(["a", ""]),
        pack_strings(["größe", "b" * 300]),
    ]


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (0, 2)])
def test_an_answer_without_a_row_for_each_row(shape):
    with pytest.raises(RowMismatch) as caught:
        split([Output("y", "FP32", shape, bytes(4 * elements(list(shape))))], [1, 1, 2])
    assert str(caught.value) == f"output 'y' has shape {list(shape)} for 4 rows of input"


def test_malformed_strings():
    """Wrong lengths raise the error that callers expect for a model's mistake."""
    with pytest.raises(RowMismatch):
        split([Output("t", "BYTES", (2,), b"\1\0\0\0a\5\0\0\0b")], [1, 1])


def test_too_few_strings():
    with pytest.raises(RowMismatch):
        split([Output("t", "BYTES", (2, 2), pack_strings(["a", "b", "c"]))], [1, 1])


def test_describe():
    label, scores = Output("l", "INT64", (4,), b""), Output("s", "FP32", (4, 10), b"")
    rows, tensors = describe([label, scores], 4)
    assert rows == 4
    assert [(t.name, t.datatype.name, t.dims) for t in tensors] == [("l", "INT64", ()), ("s", "FP32", (10,))]


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [([(4,), (3,)], 4), ([(4,), ()], 4), ([(4, 10)], 0), ([(4, 10)], 3)],
)
def test_an_answer_without_a_batch_axis_keeps_its_shapes(shapes, rows):
    outputs = [Output(f"o{at}", "FP32", shape, b"") for at, shape in enumerate(shapes)]
    found, tensors = describe(outputs, rows)
    assert found == 0
    assert [t.dims for t in tensors] == shapes


@given(partitions, st.integers(0, 10_000))
def test_token_counts_are_divided_and_nothing_else_is(parts, count):
    """Their sum is that of the call. Each request gets all other parameters."""
    given_ = {"prompt_tokens": count, "model": "m", "finish": True, "temperature": 0.5, "top_k": 3}
    found = split_parameters(given_, parts)
    assert sum(each["prompt_tokens"] for each in found) == count
    assert all(each | {"prompt_tokens": 0} == given_ | {"prompt_tokens": 0} for each in found)


def test_equal_rows_get_equal_counts():
    assert split_parameters({"completion_tokens": 30}, [1, 2]) == [
        {"completion_tokens": 10},
        {"completion_tokens": 20},
    ]


def test_what_only_looks_like_a_count_is_copied():
    assert (
        split_parameters({"prompt_tokens": True, "output_tokens": "7"}, [1, 1])
        == [{"prompt_tokens": True, "output_tokens": "7"}] * 2
    )
