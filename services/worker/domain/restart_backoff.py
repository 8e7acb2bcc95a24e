"""Decide how long to wait before a model server that died is started again."""

from __future__ import annotations

from dataclasses import dataclass, replace

# If a server has served for this many seconds, its death starts a new streak of deaths.
QUIET_S = 60.0
# Seconds between two starts after the first quick death. Each further quick death doubles this interval, up
# to LONGEST_INTERVAL_S.
SHORTEST_INTERVAL_S = 0.5
LONGEST_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class DeathStreak:
    """A streak of deaths, and the seconds to wait before the next start (``pause_s``).

    ``deaths``: the number of deaths in the streak. If a server has served for at least ``QUIET_S`` seconds,
    its death starts a new streak.

    ``quick``: the number of quick deaths, minus one for each slower death; never below 0. A death is quick if
    the server has served for less than :func:`start_interval_s`.
    """

    deaths: int = 0
    pause_s: float = 0.0
    quick: int = 0


def start_interval_s(quick: int) -> float:
    """Return the minimum seconds between two starts: 0.5, 1, 2, 4, then 5 as ``quick`` grows from 0."""
    return min(LONGEST_INTERVAL_S, SHORTEST_INTERVAL_S * 2.0 ** min(quick, 16))


def after_death(streak: DeathStreak, served_s: float, *, excused: bool = False) -> DeathStreak:
    """Return the streak after the death of a process that had served for ``served_s`` seconds.

    Only a quick death delays the next start. The first death of a streak never delays it.

    ``excused``: True if a suspect ran alone in the model. Then this request caused the death, and the next
    start is not delayed. Within a streak, such a death is not counted. Outside a streak, it starts one.
    """
    if served_s >= QUIET_S:
        return DeathStreak(1)
    if excused:
        return replace(streak, deaths=max(1, streak.deaths), pause_s=0.0)
    interval_s = start_interval_s(streak.quick)
    if served_s >= interval_s:
        return DeathStreak(streak.deaths + 1, 0.0, max(0, streak.quick - 1))
    return DeathStreak(streak.deaths + 1, interval_s - served_s if streak.deaths else 0.0, streak.quick + 1)
