"""The bars of the benchmark of language models: met and missed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from benchmarks.llm_report import judge, tables

pytestmark = pytest.mark.unit


def side(rate: float) -> dict[str, Any]:
    times = dict.fromkeys(("first_p50_ms", "first_p99_ms", "between_p50_ms", "between_p99_ms"), 10.0)
    return {"tokens_per_s": rate, "requests": 8, "answered": 8, "cpu_us": {"gateway": 90.0}, **times}


def row(rate: float) -> dict[str, Any]:
    compared = {"ratio": 0.97, "first_more_ms": 4.0, "between_p99_ratio": 1.05}
    return {"direct": side(rate), "tidegate": side(rate), **compared}


GOOD: dict[str, Any] = {
    "slots": 8,
    "callers": {"1": row(50.0), "8": row(100.0), "24": row(96.0)},
}


def missed(found: dict[str, Any]) -> list[str]:
    return [bar.text for bar in judge("llamacpp", found) if bar.verdict != "PASS"]


def test_all_bars_are_met() -> None:
    assert missed(GOOD) == []
    assert len(judge("llamacpp", GOOD)) == 10


@pytest.mark.parametrize(
    ("callers", "key", "value", "text"),
    [
        ("8", "ratio", 0.94, "llamacpp, 8 callers: tokens/s"),
        ("1", "first_more_ms", 10.5, "first token at most"),
        ("8", "between_p99_ratio", 1.2, "8 callers: p99 between tokens"),
        ("8", "ratio", float("nan"), "8 callers: tokens/s"),
    ],
)
def test_a_comparison_that_is_missed(callers: str, key: str, value: float, text: str) -> None:
    found = deepcopy(GOOD)
    found["callers"][callers][key] = value
    (told,) = missed(found)
    assert text in told


def test_lost_requests_and_lost_goodput() -> None:
    found = deepcopy(GOOD)
    found["callers"]["24"]["tidegate"]["tokens_per_s"] = 90.0
    found["callers"]["1"]["tidegate"]["answered"] = 7
    assert len(missed(found)) == 2


def test_the_tables_have_a_line_for_each_number_of_callers() -> None:
    first, cpu = tables("llamacpp", GOOD)
    assert first.count("\n") == 6
    assert "gateway" in cpu
