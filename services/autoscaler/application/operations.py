"""The operations of the API: statuses, explanations, policies, overrides, hosts and replicas."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from services.autoscaler.adapters.leader_lock import LeaderLock
from services.autoscaler.application.control_loop import ControlLoop, LoopParts
from services.autoscaler.application.warm_pool import WarmPool
from services.autoscaler.domain.bounds import bounds
from services.autoscaler.domain.cold_start import report, start_time
from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.deployment_round import HOST_FULL
from services.autoscaler.domain.explain import explain, policy_of
from services.autoscaler.domain.snapshot import LocalOverride, Policy
from services.autoscaler.domain.status import replica_view
from tidegate.kernel.errors import NotFound, Unavailable
from tidegate.kernel.protocol.deployment_status import DeploymentStatus
from tidegate.kernel.protocol.models import Deployment

SHOWN_DECISIONS = 5


@dataclass(frozen=True, slots=True)
class OverrideEffect:
    """The effect of an override.

    ``replicas``: the resulting number of replicas; None if it is not known yet. ``bounded_by`` and
    ``reason``: why this number is smaller than requested.
    """

    replicas: int | None = None
    bounded_by: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Operations:
    """The operations of the API. A standby reads statuses from the store.

    A standby raises ``Unavailable`` for operations that need the leader.
    """

    loop: ControlLoop
    parts: LoopParts
    pool: WarmPool
    leader: LeaderLock
    policy: Policy

    async def statuses(self) -> list[DeploymentStatus]:
        """Return the status of every Deployment, sorted by name."""
        return [status for _, status in sorted((await self._all()).items())]

    async def status(self, name: str) -> DeploymentStatus:
        """Return the status of one Deployment. Raise ``NotFound`` if there is no such Deployment."""
        found = (await self._all()).get(name)
        if found is None:
            raise NotFound(f"There is no Deployment {name}.")
        return found

    async def why(self, name: str) -> dict[str, Any]:
        """Return why a Deployment has its number of replicas, with its last decisions."""
        self._must_lead()
        deployment, snapshot, state = self.deployment(name), self.loop.snapshot, self.loop.state
        if snapshot is None or name not in state.deployments:
            raise Unavailable(f"There is no decision for Deployment {name} yet.")
        status = await self.status(name)
        return {
            **explain(deployment, snapshot, state, self.policy, time.time()),
            "replicas": {phase: getattr(status, phase) for phase in ("ready", "starting", "draining")},
            "predicted_wait_ms": status.predicted_wait_ms,
            "cost_per_hour": status.cost_per_hour,
            "conditions": status.conditions,
            "ended": status.ended,
            "decisions": await self.decisions(name, SHOWN_DECISIONS),
        }

    def policy_of(self, name: str) -> dict[str, Any]:
        """Return how a Deployment scales: its options, and the resulting values."""
        start_s = start_time(self.loop.state, name) or 0.0
        over = self.parts.costs.over_budget.get(name, "")
        return policy_of(self.deployment(name), self.policy, start_s, time.time(), over)

    async def change_policy(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Change how a Deployment scales. Raise Unavailable if the registry does not answer."""
        changed = await self.parts.source.registry.patch_policy(name, changes)
        self._changed()
        start_s = start_time(self.loop.state, name) or 0.0
        return policy_of(changed, self.policy, start_s, time.time())

    async def override(
        self, name: str, replicas: int, ttl_s: float | None, *, force: bool = False
    ) -> tuple[str, OverrideEffect]:
        """Set a fixed number of replicas. Return where the override is stored, and its effect."""
        known = self._known(name)
        held_by = await self.parts.overrides.put(name, replicas, ttl_s, force=force, known=known)
        effect = await self._effect_of(name, replicas, ttl_s, force)
        self._changed()
        return held_by, effect

    async def _effect_of(self, name: str, replicas: int, ttl_s: float | None, force: bool) -> OverrideEffect:
        """Decide again about the last snapshot, but with an override. Return the effect of the override."""
        snapshot, now = self.loop.snapshot, time.time()
        deployment = next((d for d in self.parts.source.deployments if d.name == name), None)
        if not self.leader.held or snapshot is None or deployment is None:
            return OverrideEffect()
        override = LocalOverride(replicas, None if ttl_s is None else now + ttl_s, force)
        overridden = replace(snapshot, overrides={**snapshot.overrides, name: override})
        _, state = await asyncio.to_thread(decide, overridden, self.policy, self.loop.state, now)
        found = state.deployments.get(name)
        if found is None or found.wanted is None:
            return OverrideEffect()
        if found.rule == HOST_FULL:
            return OverrideEffect(found.target, "host", found.wanted.reason)
        if found.target >= replicas:
            return OverrideEffect(found.target)
        start_s, over = start_time(state, name) or 0.0, snapshot.over_budget.get(name, "")
        rule = bounds(deployment, now, start_s, over).high_rule
        return OverrideEffect(found.target, rule, found.wanted.reason)

    async def pause(self, name: str, ttl_s: float | None, *, hold: bool) -> tuple[int, str]:
        """Pause scaling: end all replicas. With ``hold``, keep the current target instead.

        Return the number of replicas during the pause, and where the pause is stored.
        """
        replicas = (await self.status(name)).desired if hold else 0
        held_by, _ = await self.override(name, replicas, ttl_s, force=hold)
        return replicas, held_by

    async def remove_override(self, name: str) -> str:
        """Remove the override of a Deployment, and return where the removal is stored."""
        held_by = await self.parts.overrides.remove(name, known=self._known(name))
        self._changed()
        return held_by

    async def drain(self, replica: str) -> None:
        """Drain a replica."""
        self._must_lead()
        await self.loop.drain(replica)

    async def cordon(self, host: str, *, drain: bool) -> list[str]:
        """Start no more replicas on a host. With ``drain``, drain its replicas and return their names."""
        self._must_lead()
        if host not in {each["host"] for each in self.hosts()}:
            raise NotFound(f"There is no host {host}.")
        await self.loop.cordon(host)
        drained = []
        # All replicas run under the present name of this host. Another name can only be an earlier name of
        # this host. No replica runs under an earlier name, so none is drained.
        for each in self.replicas() if drain and host == self.loop.host else []:
            if each["alive"] and each["state"] != "draining":
                with contextlib.suppress(NotFound):  # the replica ended meanwhile
                    await self.loop.drain(each["replica"])
                    drained.append(each["replica"])
        return drained

    async def uncordon(self, host: str) -> None:
        """Allow starts on a host again."""
        self._must_lead()
        if host not in self.loop.cordoned:
            raise NotFound(f"Host {host} is not cordoned.")
        await self.loop.uncordon(host)

    def hosts(self) -> list[dict[str, Any]]:
        """Return this host with its resources and number of replicas, and every other cordoned host."""
        cordoned = self.loop.cordoned
        here = sum(1 for each in self.replicas() if each["alive"])
        names = dict.fromkeys([self.loop.host, *sorted(cordoned)])
        room = self.loop.snapshot.room if self.loop.snapshot is not None else None
        known = asdict(room) if room is not None else {}
        return [
            {
                "host": name,
                "replicas": here if name == self.loop.host else 0,
                "cordoned_at": cordoned.get(name),
                **(known if name == self.loop.host else {}),
            }
            for name in names
        ]

    async def decisions(self, deployment: str | None, limit: int) -> list[dict[str, Any]]:
        """Return the last decisions, newest first: from memory, or from disk if memory has too few."""
        recent = [d for d in reversed(self.loop.recent) if deployment in (None, d.deployment)]
        if len(recent) >= limit:
            return [asdict(decision) for decision in recent[:limit]]
        return await asyncio.to_thread(self.parts.decisions.decisions, deployment, limit)

    async def cold_starts(self) -> list[dict[str, Any]]:
        """Return a summary of the cold starts of each Deployment."""
        return [report(status.deployment, status.cold_starts) for status in await self.statuses()]

    def warm(self) -> list[dict[str, Any]]:
        """Return the warm pools and their waiting workers."""
        self._must_lead()
        return self.pool.view()

    def replicas(self) -> list[dict[str, Any]]:
        """Return every replica that the last round listed."""
        snapshot = self.loop.snapshot
        if snapshot is None:
            return []
        reports, memories = snapshot.reports or {}, self.loop.state.replicas
        return [
            {**replica_view(r, reports.get(r.replica), memories.get(r.replica)), "alive": r.alive}
            for r in snapshot.running or ()
        ]

    def deployment(self, name: str) -> Deployment:
        """Return a Deployment of the last desired state. Raise ``NotFound`` if it is not there."""
        found = next((d for d in self.parts.source.deployments if d.name == name), None)
        if found is None:
            raise NotFound(f"There is no Deployment {name}.")
        return found

    async def _all(self) -> dict[str, DeploymentStatus]:
        if self.leader.held:
            return self.loop.statuses
        published = await self.parts.store.statuses()
        return {name: DeploymentStatus.model_validate(status) for name, status in published.items()}

    def _must_lead(self) -> None:
        if not self.leader.held:
            raise Unavailable(f"This autoscaler is a standby. The leader is process {self.leader.holder()}.")

    def _known(self, name: str) -> bool:
        return any(d.name == name for d in self.parts.source.deployments)

    def _changed(self) -> None:
        self.parts.source.refresh_soon()
        self.loop.wake()
