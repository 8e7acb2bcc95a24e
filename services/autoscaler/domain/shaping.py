"""Turn the need of this round into the next target, with windows, panic and limits on the rate of change.

To scale up, the smallest need of the up window counts. To scale down, the largest need of the down window
counts. The Kubernetes HPA does the same. As in Knative, a panic begins when the need is several times the
ready replicas. Then the need is met immediately, and no replica is removed until one down window after the
last such need. Limits say how many replicas may be added or removed within a minute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.autoscaler.domain.memory import DeploymentMemory
from services.autoscaler.domain.tuning import Tuning

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shaped:
    """The number of replicas after windows and limits.

    ``held``: the largest need of the down window. ``rule`` and ``words`` say why the number differs from the
    need; empty if they are the same.
    """

    replicas: int
    held: int
    rule: str = ""
    words: str = ""


def remember(
    memory: DeploymentMemory, need: int, tuning: Tuning, now: float, *, known: bool
) -> tuple[int, int, DeploymentMemory]:
    """Return the smallest need of the up window, the largest of the down window, and the new memory.

    ``known`` is True if the whole demand is known. If it is False, the need is not stored, because the real
    need may be larger.
    """
    # Older needs matter only if they are larger (down window) or smaller (up window) than the present need.
    larger = [(at, n) for at, n in memory.recommended if at > now - tuning.down_window_s and n > need]
    lower = [(at, n) for at, n in memory.lowest if at > now - tuning.up_window_s and n < need]
    if known:
        lowest = (*lower, (now, need)) if tuning.up_window_s else ()
        memory = replace(memory, recommended=(*larger, (now, need)), lowest=lowest)
    least = lower[0][1] if lower and tuning.up_window_s else need
    return least, larger[0][1] if larger else need, memory


def shape(
    memory: DeploymentMemory, need: int, least: int, most: int, *, panic: bool, tuning: Tuning, now: float
) -> Shaped:
    """Return the next target for ``need``.

    ``least``: the smallest need of the up window. ``most``: the largest need of the down window.
    """
    current = memory.target
    found = Shaped(most, most)
    if most > current and not panic and max(least, current) < most:
        wait = f"{need} replicas are started only after they have been needed for {tuning.up_window_s:g} s"
        found = Shaped(max(least, current), most, "waiting", wait)
    if panic:
        found = Shaped(max(found.replicas, current), most)
        if found.replicas > need:
            return Shaped(found.replicas, most, "panic", "after a sudden load, no replica is removed")
        return found
    return _limited(memory, found, tuning, now)


def _limited(memory: DeploymentMemory, found: Shaped, tuning: Tuning, now: float) -> Shaped:
    current = memory.target
    recent = [change for at, change in memory.moves if now - at < MINUTE_S]
    if tuning.max_up_per_minute is not None and found.replicas > max(current, 1):
        # The first replica is never limited, because it wakes the Deployment.
        room = max(0, tuning.max_up_per_minute - sum(change for change in recent if change > 0))
        up = max(1, current + room)
        if up < found.replicas:
            words = (
                f"{found.replicas} replicas are needed, but max_up_per_minute is {tuning.max_up_per_minute}"
            )
            return Shaped(up, found.held, "limited", words)
    if tuning.max_down_per_minute is not None and found.replicas < current:
        room = max(0, tuning.max_down_per_minute + sum(change for change in recent if change < 0))
        if current - room > found.replicas:
            words = (
                f"{found.replicas} replicas are enough, but max_down_per_minute is "
                f"{tuning.max_down_per_minute}"
            )
            return Shaped(current - room, found.held, "limited", words)
    return found


def moved(memory: DeploymentMemory, replicas: int, now: float) -> DeploymentMemory:
    """Return ``memory`` with the new target, and with its change in ``moves``."""
    change = replicas - memory.target
    recent = tuple((at, n) for at, n in memory.moves if now - at < MINUTE_S)
    return replace(memory, target=replicas, moves=(*recent, (now, change)) if change else recent)
