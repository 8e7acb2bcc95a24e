"""Compute the figures of a load: times to the first token, between tokens, and of whole answers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tidegate.tune.curve import quantile

SHARES = (50, 90, 99)


@dataclass(slots=True)
class CallRecord:
    """One request. Times are seconds since the load began.

    ``token_times``: when each event with text arrived. ``tokens``: the number of tokens in the answer, as the
    engine counted them. If the engine reports no count, this is the number of events with text. ``cut``: True
    if the load ended before the answer was complete.
    """

    started: float
    token_times: list[float] = field(default_factory=list)
    ended: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    status: int = 0
    problem: str = ""
    cut: bool = False
    text: str = ""

    @property
    def good(self) -> bool:
        """Return True if the answer is complete."""
        return self.ended is not None and not self.problem and not self.cut


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles in milliseconds; None without a measurement."""

    mean: float | None
    percentiles: dict[int, float | None]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        """Return the mean and the percentiles of ``seconds``, in milliseconds."""
        values = sorted(1e3 * each for each in seconds)
        mean = sum(values) / len(values) if values else None
        return cls(mean, {share: quantile(values, share / 100) for share in SHARES})

    def document(self) -> dict[str, float | None]:
        """Return the values as JSON members, such as ``p50_ms``."""
        return {"mean_ms": self.mean, **{f"p{share}_ms": value for share, value in self.percentiles.items()}}


@dataclass(frozen=True, slots=True)
class LlmFigures:
    """The result of a load that took ``seconds``.

    ``first_token`` and ``between_tokens`` also include requests that were incomplete when the load ended.
    ``whole`` includes only complete answers.
    """

    seconds: float
    answered: int
    failed: int
    cut: int
    problems: dict[str, int]
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    first_token: Spread
    between_tokens: Spread
    whole: Spread

    def document(self) -> dict[str, Any]:
        """Return the figures as the option ``--json`` prints them."""
        spreads = {
            name: getattr(self, name).document() for name in ("first_token", "between_tokens", "whole")
        }
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in spreads}
        return plain | spreads


def figures_of(records: Sequence[CallRecord], began: float, ended: float) -> LlmFigures:
    """Return the figures for the time from ``began`` to ``ended``.

    Both are seconds since the load began. Count only tokens that arrived in this time. An event does not say
    how many tokens it contains, so the tokens of a complete answer are divided equally among its events.
    """
    seen = [each for each in records if (each.ended or ended) > began and each.started < ended]
    done = [each for each in seen if each.good and (each.ended or 0) <= ended]
    tokens = sum(_tokens_in(each, began, ended) for each in seen)
    failures = [each for each in seen if each.problem]
    seconds = max(ended - began, 1e-9)
    return LlmFigures(
        seconds=seconds,
        answered=len(done),
        failed=len(failures),
        cut=sum(each.cut for each in seen),
        problems=dict(Counter(each.problem for each in failures)),
        prompt_tokens=sum(each.prompt_tokens for each in done),
        cached_tokens=sum(each.cached_tokens for each in done),
        tokens=round(tokens),
        tokens_per_s=tokens / seconds,
        requests_per_s=len(done) / seconds,
        first_token=Spread.of(
            each.token_times[0] - each.started
            for each in seen
            if each.token_times and began <= each.token_times[0] <= ended and not each.problem
        ),
        between_tokens=Spread.of(gap for each in seen for gap in _gaps(each.token_times, began, ended)),
        whole=Spread.of(each.ended - each.started for each in done if each.ended is not None),
    )


def _tokens_in(record: CallRecord, began: float, ended: float) -> float:
    events = sum(began <= at <= ended for at in record.token_times)
    if not record.token_times:
        return 0.0 if record.problem else float(record.tokens)
    # Divide the tokens of a complete answer among its events, because it often has more tokens than events
    # with text. For an incomplete answer, count each event as one token.
    return events * max(record.tokens, 1) / len(record.token_times) if record.good else float(events)


def _gaps(times: Sequence[float], began: float, ended: float) -> list[float]:
    return [b - a for a, b in pairwise(times) if a >= began and b <= ended]
