"""From what is needed now to what is done: windows, panic and limits on the rate of change.

The need of a moment is no plan. Going up, the smallest need of the up window counts; going down, the largest
of the down window (both as the Kubernetes HPA does it). A need of several times what is ready is a panic, as
in Knative: met at once, and nothing is taken away until it has been over for the down window. Limits say how
many replicas a minute may bring or take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.autoscaler.domain.memory import DeploymentMemory
from services.autoscaler.domain.tuning import Tuning

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Shaped:
    """``replicas`` after windows and limits; ``held`` the largest need of the down window. ``rule`` says
    what changed the need, if anything did.
    """

    replicas: int
    held: int
    rule: str = ""
    words: str = ""


def remember(
    memory: DeploymentMemory, wanted: int, tuning: Tuning, now: float, *, known: bool
) -> tuple[int, int, DeploymentMemory]:
    """(smallest need of the up window, largest of the down window, memory). A need that is not ``known``
    in full holds nothing down, so it is not kept.
    """
    # Older needs that are not larger will never be the largest again, nor the others the smallest.
    larger = [(at, n) for at, n in memory.recommended if at > now - tuning.down_window_s and n > wanted]
    lower = [(at, n) for at, n in memory.lowest if at > now - tuning.up_window_s and n < wanted]
    if known:
        lowest = (*lower, (now, wanted)) if tuning.up_window_s else ()
        memory = replace(memory, recommended=(*larger, (now, wanted)), lowest=lowest)
    least = lower[0][1] if lower and tuning.up_window_s else wanted
    return least, larger[0][1] if larger else wanted, memory


def shape(
    memory: DeploymentMemory, wanted: int, least: int, most: int, *, panic: bool, tuning: Tuning, now: float
) -> Shaped:
    """The need of ``wanted``, ``least`` and ``most`` of its windows, as a step from the last target."""
    current = memory.target
    found = Shaped(most, most)
    if most > current and not panic and max(least, current) < most:
        wait = f"{wanted} are needed, but not yet for {tuning.up_window_s:g} s"
        found = Shaped(max(least, current), most, "waiting", wait)
    if panic:
        found = Shaped(max(found.replicas, current), most)
        if found.replicas > wanted:
            return Shaped(found.replicas, most, "panic", "after a sudden load, no replica is removed")
        return found
    return _limited(memory, found, tuning, now)


def _limited(memory: DeploymentMemory, found: Shaped, tuning: Tuning, now: float) -> Shaped:
    current = memory.target
    recent = [change for at, change in memory.moves if now - at < MINUTE_S]
    if tuning.max_up_per_minute is not None and found.replicas > max(current, 1):
        # The first one is never waited for: it is what wakes a Deployment.
        room = max(0, tuning.max_up_per_minute - sum(change for change in recent if change > 0))
        up = max(1, current + room)
        if up < found.replicas:
            words = f"{found.replicas} are needed, but max_up_per_minute is {tuning.max_up_per_minute}"
            return Shaped(up, found.held, "limited", words)
    if tuning.max_down_per_minute is not None and found.replicas < current:
        room = max(0, tuning.max_down_per_minute + sum(change for change in recent if change < 0))
        if current - room > found.replicas:
            words = f"{found.replicas} are enough, but max_down_per_minute is {tuning.max_down_per_minute}"
            return Shaped(current - room, found.held, "limited", words)
    return found


def moved(memory: DeploymentMemory, replicas: int, now: float) -> DeploymentMemory:
    """``memory`` with the new target, and the change in it."""
    change = replicas - memory.target
    recent = tuple((at, n) for at, n in memory.moves if now - at < MINUTE_S)
    return replace(memory, target=replicas, moves=(*recent, (now, change)) if change else recent)
