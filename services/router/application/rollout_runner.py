"""Judge every running canary once a second, and write the verdicts to the registry.

Only the leader judges. A file in the state folder holds the evidence of each rollout, so another router can
continue. The gateways count requests even while no router runs, so no request is missed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from services.router.adapters import shared_file
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.rollout_metrics import VERDICTS, RolloutMetrics
from services.router.application.leadership import Leadership
from services.router.domain import canary
from services.router.domain.canary import CanaryDecision
from services.router.domain.canary_health import CanaryHealth, health_of
from services.router.domain.rollout_watch import RolloutWatch, policy_of
from services.router.domain.table import ready_counts
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.models import Endpoint, Rollout, RolloutPhase
from tidegate.kernel.protocol.presence import GatewayReport, ReplicaReport
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable
from tidegate.kernel.store.feedback import FeedbackStore

log = telemetry.logger(__name__)

TICK_S = 1.0
FEEDBACK_AT_ONCE = 5000
_PHASES: dict[canary.Verdict, RolloutPhase] = {
    "advance": "running",
    "promote": "promoted",
    "pause": "paused",
    "roll_back": "rolled_back",
}


class RolloutRunner:
    """One of the router's loops. :attr:`watches` holds the evidence of each endpoint's last rollout."""

    def __init__(
        self,
        store: Store,
        registry: RegistryCache,
        leadership: Leadership,
        disk: Path,
        wake: Callable[[], None],
        condemned: set[str],
        feedback: FeedbackStore,
    ) -> None:
        """``wake``: a function that makes the controller read the registry immediately.

        ``condemned``: the ids of rollouts that the router has rolled back, but whose rollback is not stored
        in the registry yet. The runner adds and removes the ids.
        """
        self._condemned = condemned
        self._feedback = feedback
        self._store = store
        self._registry = registry
        self._leadership = leadership
        self._disk = disk
        self._wake = wake
        self._loop = RepeatingTask("rollouts", self._step, retry_s=TICK_S)
        self._led = False
        self._metrics = RolloutMetrics()
        self.watches: dict[str, RolloutWatch] = {}

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop."""
        await self._loop.stop()

    def shown(self, endpoint: Endpoint) -> dict[str, Any]:
        """Return an endpoint's rollout with its evidence, for JSON."""
        rollout = endpoint.rollout
        if rollout is None:
            return {"endpoint": endpoint.name, "rollout": None}
        found: dict[str, Any] = {"endpoint": endpoint.name, "rollout": rollout.model_dump(mode="json")}
        watch = self._watch(endpoint.name, rollout.id, create=False)
        if watch is None:
            return found
        state = watch.state
        policy = policy_of(rollout)
        following = policy.steps[state.step + 1 :]
        last = not following or following[0] >= 100
        return found | {
            "share": canary.share(policy, state),
            "samples": state.samples,
            "missing": (
                [
                    *([watch.health.waits] if watch.health.waits else ()),
                    *canary.missing(policy, state, time.time(), last=last),
                    *([watch.unjudged(rollout)] if last and watch.unjudged(rollout) else ()),
                ]
                if rollout.active
                else []
            ),
            "evidence": watch.evidence(rollout),
            "slow_ms": watch.slow_ms(),
            "points": [asdict(point) for point in watch.points],
        }

    async def _step(self) -> float:
        if not self._leadership.leads:
            self._led = False
            self._metrics.keep(set())
            return TICK_S
        if not self._led:
            self._load()
            self._led = True
        active = [e for e in self._endpoints() if e.rollout is not None and e.rollout.active]
        self._metrics.keep({endpoint.name for endpoint in active})
        if active:
            with contextlib.suppress(StoreUnavailable):
                view = await self._store.gateways()
                replicas, statuses = await self._store.replicas(), await self._store.statuses()
                ready = ready_counts(replicas)
                for endpoint in active:
                    assert endpoint.rollout is not None
                    name = endpoint.rollout.deployment
                    health = health_of(name, ready.get(name, 0), statuses.get(name), time.time())
                    await self._judge(endpoint, view.reports, health, replicas)
                self._save()
        return TICK_S

    def _endpoints(self) -> list[Endpoint]:
        return self._registry.desired.endpoints if self._registry.desired is not None else []

    async def _judge(
        self,
        endpoint: Endpoint,
        reports: Iterable[GatewayReport],
        health: CanaryHealth,
        replicas: Sequence[ReplicaReport],
    ) -> None:
        rollout = endpoint.rollout
        assert rollout is not None
        watch = self._watch(endpoint.name, rollout.id, create=True)
        assert watch is not None
        feedback = await self._reported(watch, rollout)
        decision = watch.observe(endpoint.name, rollout, reports, time.time(), health, feedback, replicas)
        self._metrics.show(
            endpoint.name, canary.share(policy_of(rollout), watch.state), watch.evidence(rollout)
        )
        if decision.verdict == "hold":
            return
        phase = _PHASES[decision.verdict]
        step = decision.state.step
        if await self._registry.progress(endpoint.name, rollout.id, phase, step, decision.reason):
            self._condemned.discard(rollout.id)
            VERDICTS.labels(decision.verdict).inc()
            self._log(endpoint, decision)
            self._wake()
        else:
            watch.undo(rollout)
            if decision.verdict == "roll_back" and rollout.id not in self._condemned:
                self._condemned.add(rollout.id)
                self._wake()

    async def _reported(self, watch: RolloutWatch, rollout: Rollout) -> list[FeedbackRecord]:
        """Return the feedback since the last call; an empty list if the rollout does not use feedback."""
        if rollout.options.metric is None:
            return []
        quality = watch.quality
        try:
            if not quality.position:
                quality.position, quality.since = await self._feedback.end(), int(rollout.since * 1000)
            records = await self._feedback.read(quality.position, FEEDBACK_AT_ONCE)
        except StoreUnavailable:  # errors and latencies can be judged without feedback
            return []
        if not records:
            return []
        quality.position = records[-1][0]
        return [record for _, record in records]

    def _log(self, endpoint: Endpoint, decision: CanaryDecision) -> None:
        assert endpoint.rollout is not None
        log.info(
            "canary decided",
            extra={
                "endpoint": endpoint.name,
                "deployment": endpoint.rollout.deployment,
                "verdict": decision.verdict,
                "why": decision.reason,
            },
        )

    def _watch(self, endpoint: str, id: str, *, create: bool) -> RolloutWatch | None:
        watch = self.watches.get(endpoint)
        if watch is not None and watch.id == id:
            return watch
        if not create:
            return None
        watch = self.watches[endpoint] = RolloutWatch(id)
        return watch

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = orjson.loads(self._disk.read_bytes())
            self.watches = {name: RolloutWatch.from_json(each) for name, each in document.items()}

    def _save(self) -> None:
        existing = {endpoint.name for endpoint in self._endpoints()}
        self.watches = {name: watch for name, watch in self.watches.items() if name in existing}
        document = {name: watch.to_json() for name, watch in self.watches.items()}
        try:
            shared_file.replace(self._disk, orjson.dumps(document))
        except OSError as error:  # a full disk must not stop the judging
            log.warning(
                "the evidence of rollouts could not be written to its file", extra={"problem": str(error)}
            )
