"""The parts of ``tidegate bench`` that need no server: prompts, figures, wrong command lines."""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest

from tidegate.tune.llm_figures import CallRecord, figures_of
from tidegate.tune.prompts import WORDS, ChatBodies, Prompts, fitted

pytestmark = pytest.mark.unit


def record(started: float, *tokens: float, ended: float, **fields: object) -> CallRecord:
    made = CallRecord(started, list(tokens), ended, tokens=len(tokens), prompt_tokens=10)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_figures_of_complete_answers() -> None:
    found = figures_of([record(0, 1, 1.5, 2, ended=2), record(1, 4, 5, ended=6)], 0, 10)
    assert (found.answered, found.failed, found.cut) == (2, 0, 0)
    assert (found.tokens, found.tokens_per_s, found.requests_per_s) == (5, 0.5, 0.2)
    assert found.prompt_tokens == 20
    assert found.first_token.document() == {"mean_ms": 2000, "p50_ms": 1000, "p90_ms": 3000, "p99_ms": 3000}
    assert found.between_tokens.percentiles[99] == 1000
    assert found.whole.percentiles == {50: 2000, 90: 5000, 99: 5000}


def test_a_window_counts_only_its_tokens() -> None:
    long = record(0, 1, 2, 3, 4, ended=5)
    found = figures_of([long], 1.5, 3.5)
    assert (found.answered, found.tokens) == (0, 2)
    assert found.first_token.mean is None
    assert found.between_tokens.percentiles[50] == 1000


def test_cut_and_failed_requests_are_no_answers() -> None:
    cut = record(0, 1, 2, ended=3, cut=True)
    failed = record(0, ended=1, problem="503: no capacity")
    found = figures_of([cut, failed], 0, 3)
    assert (found.answered, found.failed, found.cut) == (0, 1, 1)
    assert found.problems == {"503: no capacity": 1}
    assert found.tokens == 2
    assert found.whole.mean is None


def test_the_engines_count_of_tokens_counts_and_not_that_of_events() -> None:
    found = figures_of([record(0, 1, 2, ended=3, tokens=8)], 0, 4)
    assert (found.tokens, found.tokens_per_s) == (8, 2.0)


def test_prompts_differ_except_for_what_they_share() -> None:
    prompts = Prompts(words=30, shared=10, seed=1)
    first, second = prompts.prompt(1).split(), prompts.prompt(2).split()
    assert first != second
    assert first[:10] == second[:10]
    assert first == prompts.prompt(1).split()
    assert len(set(WORDS)) == len(WORDS)
    assert Prompts(3, given=["a", "b"]).prompt(3) == "b"
    assert fitted(100, 140, 100) == 60
    assert fitted(10, 140, 100) == 1


def test_the_body_of_a_chat() -> None:
    made = orjson.loads(ChatBodies("m", Prompts(1, ["Hello?"]), {"max_tokens": 3}).body(0))
    assert made["messages"] == [{"role": "user", "content": "Hello?"}]
    assert (made["stream"], made["max_tokens"]) == (True, 3)


def test_a_load_is_closed_or_open(tidegate: Callable[..., tuple[int, str, str]]) -> None:
    code, _, told = tidegate("bench", "m", "--callers", "2", "--rate", "3")
    assert code == 2
    assert "either --callers" in told
