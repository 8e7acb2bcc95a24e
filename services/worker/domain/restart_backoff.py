"""Decide how long the next start of a model server waits after it died."""

from __future__ import annotations

from dataclasses import dataclass, replace

# After serving for this long, a death starts a new streak.
QUIET_S = 60.0
# Starts are this far apart after a quick death, then twice as far for each further one.
SHORTEST_INTERVAL_S = 0.5
LONGEST_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class DeathStreak:
    """Deaths in a row, each within ``QUIET_S`` of its start. The next start waits ``pause_s`` seconds.

    ``quick`` counts recent deaths that came sooner after the start than :func:`start_interval_s`.
    """

    deaths: int = 0
    pause_s: float = 0.0
    quick: int = 0


def start_interval_s(quick: int) -> float:
    """Return the time between starts after so many quick deaths, in seconds: 0.5, 1, 2, 4, then 5."""
    return min(LONGEST_INTERVAL_S, SHORTEST_INTERVAL_S * 2.0 ** min(quick, 16))


def after_death(streak: DeathStreak, served_s: float, *, excused: bool = False) -> DeathStreak:
    """Return the streak with one more death, of a process that had served for ``served_s`` seconds.

    Only quick deaths delay starts, and never the first one. After a longer service there is no pause.
    ``excused``: a request that was lost before ran alone, so it is to blame and not the model.
    """
    if served_s >= QUIET_S:
        return DeathStreak(1)
    if excused:
        return replace(streak, deaths=max(1, streak.deaths), pause_s=0.0)
    interval_s = start_interval_s(streak.quick)
    if served_s >= interval_s:
        return DeathStreak(streak.deaths + 1, 0.0, max(0, streak.quick - 1))
    return DeathStreak(streak.deaths + 1, interval_s - served_s if streak.deaths else 0.0, streak.quick + 1)
