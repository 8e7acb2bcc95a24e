"""The language of searches."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.domain import filters, pages
from services.registry.domain.filters import Condition, Subject
from tidegate.kernel.errors import BadRequest

WORDS = ["owner", "=", ">", "in", "(", ")", ",", "and", "'a'", "0.5", "2026-01-01", "is", "null", "metrics.a"]


def test_conditions_of_every_kind():
    found = filters.parse(
        'metrics.accuracy >= 0.9 and tags.team = "fraud" AND created > 2026-01-01 and owner in (ann, "b c")'
        " and trained < 2026-02-03T04:05:06Z and name like 'dig%' and params.depth = 4 and run is not null"
    )
    assert [(c.subject.kind, c.subject.name, c.operator, c.values) for c in found] == [
        ("metric", "accuracy", ">=", (0.9,)),
        ("tag", "team", "=", ("fraud",)),
        ("column", "created", ">", (datetime(2026, 1, 1, tzinfo=UTC),)),
        ("field", "owner", "in", ("ann", "b c")),
        ("field", "trained", "<", (datetime(2026, 2, 3, 4, 5, 6, tzinfo=UTC),)),
        ("column", "model", "like", ("dig%",)),
        ("parameter", "depth", "=", (4.0,)),
        ("field", "run", "not null", ()),
    ]


def test_a_bare_name_with_a_number_is_a_metric():
    accuracy = Subject("metric", "accuracy", "number")
    assert filters.parse("accuracy > 0.9") == (Condition(accuracy, ">", (0.9,)),)
    assert filters.parse("metrics.`val loss` < 1e-3")[0].subject.name == "val loss"
    assert filters.parse('metrics."f1"=1')[0].values == (1.0,)
    assert filters.parse("  ") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('onwer = "x"', "the name 'onwer' does not exist"),
        ("metrics.accuracy > high", "compare it with a number"),
        ("created > yesterday", "not a date"),
        ("created > 2026-13-01", "not a date"),
        ("created = 5", "compare it with a date"),
        ("created > 0001-01-01T00:00:00+10:00", "not a date"),
        ("owner > ann", "texts have no order"),
        ("owner = a or owner = b", "cannot use `or`"),
        ("owner = a owner = b", "write `and` between two conditions"),
        ("owner = a and", "ends after `and`"),
        ("owner =", "a value must follow"),
        ("owner", "an operator must follow"),
        ("= 5", "must begin with a name"),
        ("owner in ann", "in parentheses"),
        ("owner in (ann", "in parentheses"),
        ("owner ; drop table versions", "cannot be read at '; drop table version'"),
        ("owner = 'open", "cannot be read"),
        ("version like 3", "`like` compares texts"),
        (r"owner like 'a\\'", "ends with a backslash"),
        ("owner = 'a\0'", "NUL"),
        (" and ".join(["version > 1"] * 33), "at most 32"),
        ("x" * 4_001, "the limit is 4000"),
        ("metrics. > 1", "a name must follow the dot"),
    ],
)
def test_a_wrong_filter_says_what_is_wrong(text, words):
    with pytest.raises(BadRequest) as error:
        filters.parse(text)
    assert words in error.value.message


def test_orders():
    assert str(filters.parse_order("metrics.accuracy DESC")) == "metric.accuracy desc"
    assert str(filters.parse_order("created")) == "column.created asc"
    assert str(filters.parse_order("accuracy desc")) == "metric.accuracy desc"
    for wrong in ("", "a b c", "created, name", "5 desc"):
        with pytest.raises(BadRequest, match=r"order_by|cannot be read"):
            filters.parse_order(wrong)


def test_cursors_belong_to_their_order():
    types = (float, str, int)
    cursor = pages.cursor_of("column.created desc", 0.1, "digits", 3)
    assert pages.read_cursor(cursor, "column.created desc", *types) == [0.1, "digits", 3]
    assert pages.read_cursor(pages.cursor_of("o", None, "digits", 3), "o", *types) == [None, "digits", 3]
    assert pages.read_cursor(None, "column.created desc", *types) is None
    with pytest.raises(BadRequest, match="another order"):
        pages.read_cursor(cursor, "column.created asc", *types)
    keys: list[tuple[Any, ...]] = [
        ([], "m", 1), ("1", "m", 1), (True, "m", 1), (1, 2, 1), (1, "m", 1.5), (1, "m", 2**40),
        (1, "m\0", 1), (1, "\ud800", 1),
    ]  # fmt: skip
    made = [pages.cursor_of("o", *each) for each in keys]
    for wrong in ("?", "AAAA", "x" * 5_000, pages.cursor_of("o"), *made):
        with pytest.raises(BadRequest, match="previous page"):
            pages.read_cursor(wrong, "o", *types)


@pytest.mark.fuzz
@given(st.text(max_size=80) | st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join))
def test_any_text_is_a_filter_or_a_clear_error(text):
    with contextlib.suppress(BadRequest):
        assert all(isinstance(each, Condition) for each in filters.parse(text))
