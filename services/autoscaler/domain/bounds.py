"""The least and the most replicas that a Deployment may have now: by itself, its schedule, its budget."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.models import Deployment


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """``low`` and ``high`` with the rule that each comes from, and words where that is no plain bound."""

    low: int
    high: int
    low_rule: str = "minimum"
    high_rule: str = "maximum"
    low_words: str = ""
    high_words: str = ""

    def hold(self, replicas: int) -> int:
        """``replicas`` within the bounds."""
        return max(self.low, min(self.high, replicas))


def bounds(deployment: Deployment, now: float, start_s: float) -> ReplicaBounds:
    """The bounds at ``now``. Of several open windows the largest bounds count, and a window's minimum does
    so ``start_s`` before it opens, which is what a replica needs. A budget goes before everything.
    """
    low, high = deployment.min_replicas, deployment.max_replicas
    found = ReplicaBounds(low, high)
    windows = deployment.scaling.schedule
    if windows:
        found = _scheduled(deployment, found, now, start_s)
    price, budget = deployment.scaling.price_per_hour, deployment.scaling.max_cost_per_hour
    if price is None or budget is None:
        return found
    afford = int(budget / price + 1e-9)
    if afford >= found.high:
        return found
    words = f"{budget:g} an hour pay for {afford} at {price:g} each"
    kept = found if found.low <= afford else ReplicaBounds(afford, afford, "cost cap", "cost cap", words)
    return ReplicaBounds(kept.low, afford, kept.low_rule, "cost cap", kept.low_words, words)


def _scheduled(deployment: Deployment, plain: ReplicaBounds, now: float, start_s: float) -> ReplicaBounds:
    lows: list[tuple[int, str]] = []
    highs: list[tuple[int, str]] = []
    for window in deployment.scaling.schedule:
        is_open = window.open_at(now)
        times = f"from {window.start!r} to {window.end!r} {window.time_zone}"
        if window.min_replicas is not None and (is_open or window.open_at(now + start_s)):
            lows.append((window.min_replicas, f"the schedule wants {window.min_replicas} {times}"))
        if window.max_replicas is not None and is_open:
            highs.append((window.max_replicas, f"the schedule allows {window.max_replicas} {times}"))
    low, low_rule, low_words = plain.low, plain.low_rule, ""
    high, high_rule, high_words = plain.high, plain.high_rule, ""
    if lows and max(lows)[0] > low:
        (low, low_words), low_rule = max(lows), "schedule"
    if highs:
        (high, high_words), high_rule = max(highs), "schedule"
    if low > high and low_rule == "schedule":  # a window that asks for more also allows it
        high, high_rule, high_words = low, "schedule", low_words
    elif low > high:  # one that allows less than the usual minimum means it
        low, low_rule, low_words = high, "schedule", high_words
    return ReplicaBounds(low, high, low_rule, high_rule, low_words, high_words)
