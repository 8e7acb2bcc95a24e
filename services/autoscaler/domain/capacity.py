"""Decide how many replicas the host has room for, and share the room when there is not enough for all.

Room is memory and cores. A replica takes the memory that its Deployment declares (``resources.memory_mb``),
else the most that one of its replicas was measured to take, else an assumed amount. It takes the cores that
are declared (``resources.cpus``), else one; the policy says how many such cores share a real one.

When not everything fits, minimums come before demand. Within each of the two the next replica goes to the
Deployment with the smallest dominant share (Ghodsi et al., "Dominant Resource Fairness", NSDI 2011). A
replica that runs is never ended because memory is short. It is ended only to make room for a Deployment
that has less than its share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.autoscaler.domain.snapshot import Host, Policy
from tidegate.kernel.protocol.models import Deployment

TINY = 1e-6


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """Memory and cores of one replica. ``source`` says in words where the figure for memory comes from."""

    memory_mb: float
    cores: float
    source: str = ""


@dataclass(frozen=True, slots=True)
class HostClaim:
    """Replicas that a Deployment wants: ``low`` comes before demand, ``held`` are those that stay."""

    name: str
    low: int
    wanted: int
    held: int
    size: ReplicaSize


@dataclass(frozen=True, slots=True)
class Room:
    """MiB and cores that are free for more replicas. Negative: more is in use than is allowed."""

    memory_mb: float
    cores: float

    def fits(self, size: ReplicaSize) -> bool:
        """Return True if one more replica of this size fits."""
        return size.memory_mb <= self.memory_mb + TINY and size.cores <= self.cores + TINY

    def less(self, size: ReplicaSize, count: int = 1) -> Room:
        """Return what is left after ``count`` more replicas; with a negative count, after as many fewer."""
        return Room(self.memory_mb - count * size.memory_mb, self.cores - count * size.cores)


def size_of(deployment: Deployment, measured_mb: int, policy: Policy) -> ReplicaSize:
    """Return what a replica of ``deployment`` takes; ``measured_mb`` 0: none was measured yet."""
    declared = deployment.resources.memory_mb
    cores = deployment.resources.cpus or 1.0
    if declared:
        return ReplicaSize(float(declared), cores, "declared")
    if measured_mb:
        return ReplicaSize(float(measured_mb), cores, "measured")
    return ReplicaSize(float(policy.replica_memory_mb), cores, "assumed")


def room_of(host: Host, policy: Policy, there: Iterable[tuple[ReplicaSize, int]]) -> Room:
    """Return the room for more replicas; ``there`` has the size and the measured MiB of all that exist.

    A replica that has not taken all of its memory yet will, so the rest of it is not free.
    """
    there = list(there)
    cores = host.cores * policy.replicas_per_core - sum(size.cores for size, _ in there)
    kept = host.memory_mb * (1.0 - policy.host_memory)
    if host.available_mb is None:
        return Room(host.memory_mb - kept - sum(size.memory_mb for size, _ in there), cores)
    promised = sum(max(0.0, size.memory_mb - taken_mb) for size, taken_mb in there)
    return Room(host.available_mb - kept - promised, cores)


def shares(claims: Sequence[HostClaim], room: Room) -> Mapping[str, int]:
    """Return how many replicas each Deployment may have, by name; ``room`` is beside those that are held."""
    total = room
    for claim in claims:
        total = total.less(claim.size, -claim.held)
    if _fits(claims, total):
        return {claim.name: claim.wanted for claim in claims}
    # What is held stays within the total: it is moved to others at most.
    used = Room(0.0, 0.0)
    for claim in claims:
        used = used.less(claim.size, -claim.held)
    left = Room(max(total.memory_mb, used.memory_mb), max(total.cores, used.cores))
    whole = left
    granted = dict.fromkeys((claim.name for claim in claims), 0)
    waiting = [(_turn(claim, 0, whole), place) for place, claim in enumerate(claims) if claim.wanted > 0]
    heapq.heapify(waiting)
    while waiting:
        _, place = heapq.heappop(waiting)
        claim = claims[place]
        if not left.fits(claim.size):
            continue
        left = left.less(claim.size)
        granted[claim.name] = count = granted[claim.name] + 1
        if count < claim.wanted:
            heapq.heappush(waiting, (_turn(claim, count, whole), place))
    return granted


def starts_allowed(host: Host | None, policy: Policy, young: int) -> int | None:
    """Return how many replicas may be started now, beside ``young`` that start; None: any number."""
    return None if host is None else max(0, pace(host, policy) - young)


def pace(host: Host, policy: Policy) -> int:
    """Return how many replicas may start at the same time."""
    return policy.starts_at_once or max(2, math.ceil(2 * host.cores))


def admitted(
    wanted: Mapping[str, int], claims: Mapping[str, HostClaim], room: Room, starts: int | None
) -> dict[str, int]:
    """Return how many of the ``wanted`` starts of each Deployment may be made now.

    Everybody's minimum comes before demand, and everybody's next replica before anybody's one after that.
    Room that was granted may still be in use by replicas that drain, so it is looked at here again.
    """
    turns = sorted(
        (claims[name].held + nth >= claims[name].low, claims[name].held + nth, name)
        for name, count in wanted.items()
        for nth in range(count)
    )
    found = dict.fromkeys(wanted, 0)
    for _, _, name in turns:
        if starts is not None and sum(found.values()) >= starts:
            break
        if room.fits(claims[name].size):
            room = room.less(claims[name].size)
            found[name] += 1
    return found


def shortage(host: Host, policy: Policy, claim: HostClaim, room: Room, granted: int) -> str:
    """Return why ``claim`` gets only ``granted``, how much more it needs, and what can be changed."""
    size, more = claim.size, claim.wanted - granted
    cores = host.cores * policy.replicas_per_core
    return (
        f"the host is full: it has room for {granted} of {claim.wanted}. {more} more need "
        f"{more * size.memory_mb:,.0f} MiB ({size.memory_mb:,.0f} each, {size.source}; "
        f"{max(0.0, room.memory_mb):,.0f} are free) and {more * size.cores:g} cores "
        f"({max(0.0, room.cores):g} of {cores:g} are free). Let other deployments have fewer replicas, "
        "or raise TIDEGATE_AUTOSCALER_HOST_MEMORY or TIDEGATE_AUTOSCALER_REPLICAS_PER_CORE"
    )


def _fits(claims: Iterable[HostClaim], total: Room) -> bool:
    for claim in claims:
        total = total.less(claim.size, claim.wanted)
    return total.memory_mb >= -TINY and total.cores >= -TINY


def _turn(claim: HostClaim, count: int, whole: Room) -> tuple[bool, float, bool, str]:
    """Return the sort key for the next replica of ``claim``, which has ``count``; smallest first."""
    memory = claim.size.memory_mb / whole.memory_mb if whole.memory_mb > 0 else 0.0
    cores = claim.size.cores / whole.cores if whole.cores > 0 else 0.0
    # Of equals the one that has its replica already: nothing is moved for nothing.
    return count >= claim.low, round(count * max(memory, cores), 9), count >= claim.held, claim.name
