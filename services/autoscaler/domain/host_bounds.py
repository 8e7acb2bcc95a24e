"""Limit the replicas of all Deployments to what the host can run, and decide how many may start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from services.autoscaler.domain.capacity import (
    HostClaim,
    ReplicaSize,
    Room,
    admitted,
    room_of,
    shares,
    shortage,
    size_of,
    starts_allowed,
)
from services.autoscaler.domain.deployment_round import Proposal
from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.snapshot import Host, Launch, Policy, Snapshot


@dataclass(frozen=True, slots=True)
class HostBounds:
    """The free memory and cores of the host in one round, and the number of allowed starts.

    ``starts``: how many replicas may start now; None means any number.
    """

    host: Host | None
    policy: Policy
    claims: Mapping[str, HostClaim]
    room: Room
    starts: int | None

    @classmethod
    def of(
        cls, snapshot: Snapshot, proposals: Sequence[Proposal], policy: Policy, state: State, now: float
    ) -> HostBounds:
        """Return the bounds of a snapshot's host. ``state`` already has the heartbeats of this round."""
        host = snapshot.room
        if host is None:
            return cls(None, policy, {}, Room(0.0, 0.0), None)
        claims = {each.name: _claim(each, policy) for each in proposals}
        alive = [each for each in snapshot.running or () if each.alive]
        unknown = ReplicaSize(float(policy.replica_memory_mb), 1.0)
        sizes = {name: claim.size for name, claim in claims.items()}
        there = [_there(each, sizes.get(each.deployment, unknown), state) for each in alive]
        young = sum(_starts(each, state) and now - each.launched_at < policy.start_window_s for each in alive)
        return cls(host, policy, claims, room_of(host, policy, there), starts_allowed(host, policy, young))

    def granted(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """Return the proposals, each limited to the replicas that the host has room for."""
        if self.host is None:
            return list(proposals)
        found = shares(list(self.claims.values()), self.room)
        return [self._bounded(each, found[each.name]) for each in proposals]

    def admitted(self, launches: Mapping[str, Sequence[Launch]], rolling: frozenset[str]) -> dict[str, int]:
        """Return how many launches of each Deployment may be made now.

        A launch of a Deployment in ``rolling`` replaces another replica, so it needs no additional room.
        """
        counts = {name: len(found) for name, found in launches.items() if found}
        if self.host is None:
            return counts
        nothing = ReplicaSize(0.0, 0.0)
        claims = {
            n: replace(self.claims[n], size=nothing) if n in rolling else self.claims[n] for n in counts
        }
        return admitted(counts, claims, self.room, self.starts)

    def _bounded(self, proposal: Proposal, granted: int) -> Proposal:
        claim = self.claims[proposal.name]
        if self.host is None or granted >= claim.desired:
            return proposal
        return proposal.bounded(granted, shortage(self.host, self.policy, claim, self.room, granted))


def _claim(proposal: Proposal, policy: Policy) -> HostClaim:
    desired = proposal.target.replicas
    deployment = proposal.round.deployment
    version = proposal.round.known.version_of(deployment)
    size = size_of(deployment, proposal.memory.replica_mb, policy, version)
    return HostClaim(
        proposal.name,
        min(proposal.target.low, desired),
        desired,
        proposal.fleet.ready + proposal.fleet.starting,
        size,
    )


def _there(running: Running, size: ReplicaSize, state: State) -> tuple[ReplicaSize, int]:
    memory = state.replicas.get(running.replica)
    if memory is not None and memory.draining_since is not None and running.memory_mb:
        return replace(
            size, memory_mb=float(running.memory_mb)
        ), running.memory_mb  # a draining replica will not need more memory than now
    return size, running.memory_mb


def _starts(running: Running, state: State) -> bool:
    memory = state.replicas.get(running.replica)
    return memory is None or (memory.ready_at is None and memory.draining_since is None)
