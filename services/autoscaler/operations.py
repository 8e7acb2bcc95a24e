"""What operators can ask: the one core behind the doors."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any

from services.autoscaler.adapters.leader import LeaderLock
from services.autoscaler.domain.snapshot import Policy
from services.autoscaler.domain.status import replica_view
from services.autoscaler.loop import Loop, Parts
from tidegate.errors import NotFound, Unavailable
from tidegate.protocol.models import DeploymentStatus


@dataclass(frozen=True, slots=True)
class Operations:
    """A standby answers what it can read from the store and leaves the rest to the leader."""

    loop: Loop
    parts: Parts
    leader: LeaderLock
    policy: Policy

    async def statuses(self) -> list[DeploymentStatus]:
        """Every Deployment's status, by name."""
        return [status for _, status in sorted((await self._all()).items())]

    async def status(self, name: str) -> DeploymentStatus:
        """One Deployment's status."""
        found = (await self._all()).get(name)
        if found is None:
            raise NotFound(f"There is no Deployment {name}.")
        return found

    async def override(self, name: str, replicas: int, ttl_s: float | None) -> str:
        """Fix the replicas of a Deployment; returns who holds the override."""
        held_by = await self.parts.overrides.put(name, replicas, ttl_s, known=self._known(name))
        self._changed()
        return held_by

    async def lift(self, name: str) -> str:
        """Remove the override of a Deployment; returns who was told."""
        held_by = await self.parts.overrides.lift(name, known=self._known(name))
        self._changed()
        return held_by

    async def drain(self, replica: str) -> None:
        """Let a replica finish and exit."""
        if not self.leader.held:
            raise Unavailable(f"This autoscaler is a standby; the leader is process {self.leader.holder()}.")
        await self.loop.drain(replica)

    async def decisions(self, deployment: str | None, limit: int) -> list[dict[str, Any]]:
        """The latest decisions, newest first: from memory while that is enough, else from disk."""
        recent = [d for d in reversed(self.loop.recent) if deployment in (None, d.deployment)]
        if len(recent) >= limit:
            return [asdict(decision) for decision in recent[:limit]]
        return await asyncio.to_thread(self.parts.ledger.decisions, deployment, limit)

    def replicas(self) -> list[dict[str, Any]]:
        """Every replica of the last look."""
        snapshot = self.loop.snapshot
        if snapshot is None:
            return []
        reports, memories = snapshot.reports or {}, self.loop.state.replicas
        return [
            {**replica_view(r, reports.get(r.replica), memories.get(r.replica)), "alive": r.alive}
            for r in snapshot.running or ()
        ]

    async def _all(self) -> dict[str, DeploymentStatus]:
        if self.leader.held:
            return self.loop.statuses
        published = await self.parts.store.statuses()
        return {name: DeploymentStatus.model_validate(status) for name, status in published.items()}

    def _known(self, name: str) -> bool:
        current = self.parts.source.current
        return current is not None and any(d.name == name for d in current.deployments)

    def _changed(self) -> None:
        self.parts.source.refresh_soon()
        self.loop.wake()
