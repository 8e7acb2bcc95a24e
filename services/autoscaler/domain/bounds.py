"""Compute the minimum and maximum number of replicas from a Deployment's limits, schedule and budgets."""

from __future__ import annotations

from dataclasses import dataclass

from services.autoscaler.domain.plural import counted
from tidegate.kernel.protocol.models import Deployment


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """The current minimum (``low``) and maximum (``high``) number of replicas of a Deployment.

    ``low_rule`` and ``high_rule`` name the rule that set each limit. ``low_words`` and ``high_words`` explain
    a limit that a schedule or a budget set; else they are empty.
    """

    low: int
    high: int
    low_rule: str = "minimum"
    high_rule: str = "maximum"
    low_words: str = ""
    high_words: str = ""

    def hold(self, replicas: int) -> int:
        """Return ``replicas``, limited to the bounds."""
        return max(self.low, min(self.high, replicas))


def bounds(deployment: Deployment, now: float, start_s: float, over_budget: str = "") -> ReplicaBounds:
    """Return the bounds at ``now``.

    ``over_budget``: the message about a budget that is used up; empty if none is used up. Such a budget sets
    both bounds.

    If several windows of the schedule are open, their largest minimum and their largest maximum apply. The
    minimum of a window applies ``start_s`` seconds earlier, so that its replicas are ready when the window
    opens. A budget per hour can lower both bounds.
    """
    low, high = deployment.min_replicas, deployment.max_replicas
    if over_budget:
        least = 0 if deployment.scaling.over_budget == "stop" else min(low, high)
        return ReplicaBounds(least, least, "budget", "budget", over_budget, over_budget)
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
    words = f"a budget of {budget:g} an hour pays for {counted(afford, 'replica')} at {price:g} each"
    kept = found if found.low <= afford else ReplicaBounds(afford, afford, "cost cap", "cost cap", words)
    return ReplicaBounds(kept.low, afford, kept.low_rule, "cost cap", kept.low_words, words)


def _scheduled(deployment: Deployment, plain: ReplicaBounds, now: float, start_s: float) -> ReplicaBounds:
    lows: list[tuple[int, str]] = []
    highs: list[tuple[int, str]] = []
    for window in deployment.scaling.schedule:
        is_open = window.open_at(now)
        times = f"from {window.start!r} to {window.end!r} {window.time_zone}"
        if window.min_replicas is not None and (is_open or window.open_at(now + start_s)):
            lows.append((window.min_replicas, f"the scheduled minimum is {window.min_replicas} {times}"))
        if window.max_replicas is not None and is_open:
            highs.append((window.max_replicas, f"the scheduled maximum is {window.max_replicas} {times}"))
    low, low_rule, low_words = plain.low, plain.low_rule, ""
    high, high_rule, high_words = plain.high, plain.high_rule, ""
    if lows and max(lows)[0] > low:
        (low, low_words), low_rule = max(lows), "schedule"
    if highs:
        (high, high_words), high_rule = max(highs), "schedule"
    if low > high and low_rule == "schedule":  # a scheduled minimum also raises the maximum
        high, high_rule, high_words = low, "schedule", low_words
    elif low > high:  # a scheduled maximum also lowers the minimum
        low, low_rule, low_words = high, "schedule", high_words
    return ReplicaBounds(low, high, low_rule, high_rule, low_words, high_words)
