"""The counts of shadow traffic: another Deployment gets copies of an endpoint's requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tidegate.kernel.protocol.latency_buckets import COUNT

# The maximum number of differing answers to keep. An entry has ids and numbers, but no data of a request.
DIFFERING_KEPT = 10


@dataclass(slots=True)
class OutputCounts:
    """The results of comparing one output in the answers of the primary and the shadow.

    All fields except ``max_*`` and ``edits`` are counts.

    ``compared``, ``agreed``: the comparisons, and those with all values within the tolerance.
    ``unlike``: comparisons in which shapes or datatypes differ, or one answer lacks the output.
    ``rows``, ``top1``: compared rows of scores, and the rows with the same best class in both answers.
    ``max_abs``, ``max_rel``: the largest absolute and relative difference of numbers.
    ``texts``, ``exact``: compared pairs of strings, and pairs of equal strings.
    ``edited``: pairs of strings with a measured edit distance. ``edits``: the sum of these distances,
      each divided by the length of the longer string.
    """

    compared: int = 0
    agreed: int = 0
    unlike: int = 0
    rows: int = 0
    top1: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    texts: int = 0
    exact: int = 0
    edited: int = 0
    edits: float = 0.0

    def add(self, other: OutputCounts) -> None:
        """Add the counts in ``other``, which come from another gateway or another comparison.

        For ``max_abs`` and ``max_rel``, keep the larger value.
        """
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, max(mine, theirs) if name.startswith("max_") else mine + theirs)


@dataclass(slots=True)
class DifferingAnswer:
    """A differing answer: the request's id, the output, the size of the difference, and the time."""

    request: str
    output: str
    difference: str
    at: float


def _no_times() -> list[int]:
    return [0] * COUNT


@dataclass(slots=True)
class ShadowCounts:
    """One gateway's counts of an endpoint's shadow traffic, since the shadow began.

    ``key``: identifies the shadow. A new shadow starts with new counts. ``offered``: the number of answered
    requests that the shadow's ``rate`` chose for a copy. Each was either ``copied``, or ``refused`` for a
    reason. ``answered``, ``failed``: the numbers of copies that were answered and that failed. All other
    copies are in flight. ``compared``, ``agreed``: the numbers of compared answers, and of those that agree
    in all outputs. ``primary``, ``shadow``: histograms of the total times of copied requests and of their
    copies, in the buckets of :mod:`tidegate.kernel.protocol.latency_buckets`. ``primary_call``,
    ``shadow_call``: the same histograms, but of the times of the model calls alone.
    """

    key: str = ""
    offered: int = 0
    copied: int = 0
    answered: int = 0
    compared: int = 0
    agreed: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, OutputCounts] = field(default_factory=dict)
    primary: list[int] = field(default_factory=_no_times)
    shadow: list[int] = field(default_factory=_no_times)
    primary_call: list[int] = field(default_factory=_no_times)
    shadow_call: list[int] = field(default_factory=_no_times)
    last_failure: str = ""
    differing: list[DifferingAnswer] = field(default_factory=list)

    def add(self, other: ShadowCounts) -> None:
        """Add the counts of another gateway."""
        for name in ("offered", "copied", "answered", "compared", "agreed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.refused, other.refused), (self.failed, other.failed)):
            for reason, count in theirs.items():
                mine[reason] = mine.get(reason, 0) + count
        for output, counts in other.outputs.items():
            self.outputs.setdefault(output, OutputCounts()).add(counts)
        for name in ("primary", "shadow", "primary_call", "shadow_call"):
            setattr(
                self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)]
            )
        self.last_failure = other.last_failure or self.last_failure
        newest = sorted([*self.differing, *other.differing], key=lambda each: each.at)
        self.differing = newest[-DIFFERING_KEPT:]

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> ShadowCounts:
        """Read counts from a JSON document. Ignore fields that only later releases know."""
        known = {each.name for each in fields(cls)}
        found = {name: value for name, value in document.items() if name in known}
        outputs = {
            name: OutputCounts(**{k: v for k, v in each.items() if k in OutputCounts.__dataclass_fields__})
            for name, each in found.pop("outputs", {}).items()
        }
        differing = [DifferingAnswer(**each) for each in found.pop("differing", ())]
        return cls(**found, outputs=outputs, differing=differing)
