"""Compute how many replicas the host has room for, and share the room if it is not enough for all.

Room is memory and cores. The memory of a replica is the first of these values that is known: the memory that
its Deployment declares (``resources.memory_mb``), the highest measured memory of the Deployment's replicas,
and the memory that was measured when its version was verified. If none is known, a value is assumed. For a
language model, this value is estimated from the size of the weights. A replica uses its declared cores
(``resources.cpus``), or else one core. The policy's ``replicas_per_core`` says how many of these cores fit
into one core of the host.

If not everything fits, minimums come before demand. In both steps, the next replica goes to the Deployment
with the smallest dominant share (Ghodsi et al., "Dominant Resource Fairness", NSDI 2011). A lack of memory
alone never ends a running replica. A replica is ended only to make room for a Deployment that has less than
its share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from services.autoscaler.domain.snapshot import Host, Policy
from tidegate.kernel.protocol.models import Deployment, Version

TINY = 1e-6
# On an over-full host, the shares are computed again at most this many times. In a test with 60,000 random
# fleets, three times were enough.
SETTLING = 20
# Estimate of the memory of a language model's replica: 1.25 times the size of the weights (a quarter for the
# KV cache), and 512 MiB for the engine. For SmolLM2-135M with 4-bit weights, the estimate is 630 MiB. The
# measured memory is 384 MiB, or 564 MiB with a full KV cache.
LLM_MEMORY, LLM_ENGINE_MB = 1.25, 512


@dataclass(frozen=True, slots=True)
class ReplicaSize:
    """Memory and cores of one replica. ``source`` says where the memory value comes from."""

    memory_mb: float
    cores: float
    source: str = ""


@dataclass(frozen=True, slots=True)
class HostClaim:
    """A Deployment's minimum (``low``), wanted (``desired``) and present (``held``) number of replicas."""

    name: str
    low: int
    desired: int
    held: int
    size: ReplicaSize


@dataclass(frozen=True, slots=True)
class Room:
    """The MiB and cores that are free for more replicas; negative if more than the limit is in use."""

    memory_mb: float
    cores: float

    def fits(self, size: ReplicaSize) -> bool:
        """Return True if one more replica of this size fits."""
        return size.memory_mb <= self.memory_mb + TINY and size.cores <= self.cores + TINY

    def less(self, size: ReplicaSize, count: int = 1) -> Room:
        """Return the free room after ``count`` more replicas. A negative ``count`` means fewer replicas."""
        return Room(self.memory_mb - count * size.memory_mb, self.cores - count * size.cores)


def size_of(
    deployment: Deployment, measured_mb: int, policy: Policy, version: Version | None = None
) -> ReplicaSize:
    """Return the memory and cores that one replica of ``deployment`` needs.

    ``measured_mb``: the highest measured memory of its replicas; 0 if it is not measured yet. ``version``:
    the version of the Deployment; None if it is not known.
    """
    declared = deployment.resources.memory_mb
    cores = deployment.resources.cpus or 1.0
    if declared:
        return ReplicaSize(float(declared), cores, "declared")
    if measured_mb:
        return ReplicaSize(float(measured_mb), cores, "measured")
    card = version.verification.card if version is not None else None
    if card is not None and card.memory_mb:
        return ReplicaSize(float(card.memory_mb), cores, "measured during the version's verification")
    if version is not None and version.format == "llm":
        estimate = math.ceil(LLM_MEMORY * version.artifact_size / 2**20) + LLM_ENGINE_MB
        if estimate > policy.replica_memory_mb:
            return ReplicaSize(float(estimate), cores, "estimated from the size of the weights")
    return ReplicaSize(float(policy.replica_memory_mb), cores, "assumed")


def room_of(host: Host, policy: Policy, there: Iterable[tuple[ReplicaSize, int]]) -> Room:
    """Return the room for more replicas. ``there``: the size and the used MiB of each replica that exists.

    Each replica takes its full size from the room, even while it uses less memory.
    """
    there = list(there)
    cores = host.cores * policy.replicas_per_core - sum(size.cores for size, _ in there)
    kept = host.memory_mb * (1.0 - policy.host_memory)
    if host.available_mb is None:
        return Room(host.memory_mb - kept - sum(size.memory_mb for size, _ in there), cores)
    promised = sum(max(0.0, size.memory_mb - taken_mb) for size, taken_mb in there)
    return Room(host.available_mb - kept - promised, cores)


def shares(claims: Sequence[HostClaim], room: Room) -> Mapping[str, int]:
    """Return how many replicas each Deployment may have. ``room``: the room that is free now."""
    total = room
    for claim in claims:
        total = total.less(claim.size, -claim.held)
    if _fits(claims, total):
        return {claim.name: claim.desired for claim in claims}
    granted = _shared(claims, total)
    # On an over-full host, shares depend on the replicas that run. The shares are computed again until they
    # no longer change, so that the next round computes the same shares.
    for _ in range(SETTLING):
        settled = _shared([replace(claim, held=granted[claim.name]) for claim in claims], total)
        if settled == granted:
            break
        granted = settled
    return granted


def _shared(claims: Sequence[HostClaim], total: Room) -> dict[str, int]:
    # Assume at least as much room as the existing replicas need, even if the host is over-full. Then, on an
    # over-full host, a Deployment can get a replica only if another Deployment loses one.
    used = Room(0.0, 0.0)
    for claim in claims:
        used = used.less(claim.size, -claim.held)
    left = Room(max(total.memory_mb, used.memory_mb), max(total.cores, used.cores))
    whole = left
    granted = dict.fromkeys((claim.name for claim in claims), 0)
    waiting = [(_turn(claim, 0, whole), place) for place, claim in enumerate(claims) if claim.desired > 0]
    heapq.heapify(waiting)
    while waiting:
        _, place = heapq.heappop(waiting)
        claim = claims[place]
        if not left.fits(claim.size):
            continue
        left = left.less(claim.size)
        granted[claim.name] = count = granted[claim.name] + 1
        if count < claim.desired:
            heapq.heappush(waiting, (_turn(claim, count, whole), place))
    return granted


def starts_allowed(host: Host | None, policy: Policy, young: int) -> int | None:
    """Return how many more replicas may start while ``young`` replicas start; None: any number."""
    return None if host is None else max(0, pace(host, policy) - young)


def pace(host: Host, policy: Policy) -> int:
    """Return how many replicas may start at the same time."""
    return policy.starts_at_once or max(2, math.ceil(2 * host.cores))


def admitted(
    desired: Mapping[str, int], claims: Mapping[str, HostClaim], room: Room, starts: int | None
) -> dict[str, int]:
    """Return how many of the ``desired`` starts of each Deployment may be made now.

    Minimums come before demand. Then Deployments take turns, one replica each. Draining replicas may still
    use the memory and cores that the new replicas need, so this function checks the free room again.
    """
    turns = sorted(
        (claims[name].held + nth >= claims[name].low, claims[name].held + nth, name)
        for name, count in desired.items()
        for nth in range(count)
    )
    found = dict.fromkeys(desired, 0)
    for _, _, name in turns:
        if starts is not None and sum(found.values()) >= starts:
            break
        if room.fits(claims[name].size):
            room = room.less(claims[name].size)
            found[name] += 1
    return found


def shortage(host: Host, policy: Policy, claim: HostClaim, room: Room, granted: int) -> str:
    """Explain why ``claim`` gets only ``granted`` replicas, which room is missing, and what would help."""
    size, more = claim.size, claim.desired - granted
    cores = host.cores * policy.replicas_per_core
    return (
        f"the host is full: it has room for {granted} of {claim.desired} replicas. The other {more} need "
        f"{more * size.memory_mb:,.0f} MiB ({size.memory_mb:,.0f} each, {size.source}; "
        f"{max(0.0, room.memory_mb):,.0f} are free) and {more * size.cores:g} cores "
        f"({max(0.0, room.cores):g} of {cores:g} are free). Reduce the replicas of other Deployments, "
        "or raise TIDEGATE_AUTOSCALER_HOST_MEMORY or TIDEGATE_AUTOSCALER_REPLICAS_PER_CORE"
    )


def _fits(claims: Iterable[HostClaim], total: Room) -> bool:
    for claim in claims:
        total = total.less(claim.size, claim.desired)
    return total.memory_mb >= -TINY and total.cores >= -TINY


def _turn(claim: HostClaim, count: int, whole: Room) -> tuple[bool, float, bool, str]:
    """Return the sort key for replica ``count`` + 1 of a claim. The smallest key gets room first."""
    memory = claim.size.memory_mb / whole.memory_mb if whole.memory_mb > 0 else 0.0
    cores = claim.size.cores / whole.cores if whole.cores > 0 else 0.0
    # If the rest of the key is equal, prefer a Deployment that already runs this replica. Otherwise, one
    # Deployment would lose a replica and another would start one, without any benefit.
    return count >= claim.low, round(count * max(memory, cores), 9), count >= claim.held, claim.name
