"""Count the copies of shadow traffic, their answers and the comparisons, by endpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from services.gateway.domain.comparison import Comparison
from tidegate.kernel.protocol.latency_buckets import bucket_of
from tidegate.kernel.protocol.shadow import DIFFERING_KEPT, DifferingAnswer, OutputCounts, ShadowCounts

# The largest number of outputs that are counted by name. A model may have any number of outputs.
OUTPUTS_KEPT = 64
MESSAGE_CHARS = 300


class ShadowCounter:
    """The counts of one process, by endpoint. The counts of a new shadow start at zero."""

    def __init__(self) -> None:
        self._counts: dict[str, ShadowCounts] = {}

    def of(self, endpoint: str, key: str) -> ShadowCounts:
        """Return the counts of an endpoint's shadow. The calling code counts by changing them in place."""
        counts = self._counts.get(endpoint)
        if counts is None or counts.key != key:
            counts = self._counts[endpoint] = ShadowCounts(key)
        return counts

    def keep(self, keys: Mapping[str, str]) -> None:
        """Keep only the counts of these shadows. ``keys``: for each endpoint, the key of its shadow."""
        for endpoint, counts in list(self._counts.items()):
            if keys.get(endpoint) != counts.key:
                del self._counts[endpoint]

    def report(self) -> dict[str, ShadowCounts]:
        """Return the counts by endpoint."""
        return self._counts


def refuse(counts: ShadowCounts, reason: str) -> None:
    """Count a request that was not copied."""
    counts.refused[reason] = counts.refused.get(reason, 0) + 1


def fail(counts: ShadowCounts, reason: str, message: str = "") -> None:
    """Count a copy that the model did not answer."""
    counts.failed[reason] = counts.failed.get(reason, 0) + 1
    if message:
        counts.last_failure = message[:MESSAGE_CHARS]


def answer(
    counts: ShadowCounts, primary_s: float, shadow_s: float, primary_call_s: float, shadow_call_s: float
) -> None:
    """Count an answered copy.

    ``primary_s``, ``shadow_s``: the times of the request and of its copy, in seconds. ``primary_call_s``,
    ``shadow_call_s``: the times of their model calls.
    """
    counts.answered += 1
    for times, seconds in (
        (counts.primary, primary_s),
        (counts.shadow, shadow_s),
        (counts.primary_call, primary_call_s),
        (counts.shadow_call, shadow_call_s),
    ):
        times[bucket_of(seconds)] += 1


def compared(counts: ShadowCounts, request: str, found: Iterable[Comparison], now: float) -> None:
    """Count the comparison of one answer. ``found``: the comparison of each output.

    ``request``: the request's id, which is recorded if the answers differ.
    """
    counts.compared += 1
    differing = []
    for output in found:
        known = counts.outputs.get(output.name)
        if known is None and len(counts.outputs) < OUTPUTS_KEPT:
            known = counts.outputs[output.name] = OutputCounts()
        if known is not None:
            known.add(output.counts)
        if output.difference:
            differing.append(DifferingAnswer(request, output.name, output.difference, now))
    if not differing:
        counts.agreed += 1
    counts.differing = [*counts.differing, *differing][-DIFFERING_KEPT:]
