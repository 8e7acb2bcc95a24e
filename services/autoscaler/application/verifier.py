"""Verify pending versions: start a scratch replica for each, and write the results to the registry.

A scratch replica that has verified its version is kept for a while. It can become the first replica of the
version, so that the model does not start twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.registry.client import RegistryClient
from services.autoscaler.adapters.registry.desired_state import DesiredStateSource
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.application.warm_pool import WarmPool
from services.autoscaler.domain.launcher import Launcher, LaunchFailed, Running, replica_name
from services.autoscaler.domain.snapshot import HostProbe, Policy
from services.autoscaler.domain.verification import (
    Attempts,
    Key,
    ScratchPlan,
    Settle,
    after_failed_launch,
    deployment_of_scratch,
    obstacle,
    plan,
    scratch_of,
)
from tidegate.kernel import telemetry
from tidegate.kernel.errors import NotFound, TidegateError
from tidegate.kernel.protocol.models import Assignment, Deployment, Version
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

PERIOD_S = 5.0
BUSY_PERIOD_S, KEPT_PERIOD_S = 0.15, 1.0
GRANT_EVERY_S = 3.0
# Seconds that a scratch replica is kept for its version's first Deployment. This is enough, because
# `tidegate deploy` creates the Deployment within a second after the verification.
KEEP_S = 15.0


class Verifier:
    """Verify pending versions with scratch replicas.

    ``problem``: why the last check failed; None if it succeeded.
    """

    def __init__(
        self,
        launcher: Launcher,
        pool: WarmPool,
        store: Store,
        registry: RegistryClient,
        source: DesiredStateSource,
        decisions: DecisionStore,
        grants: ReplicaGrants,
        probe: HostProbe,
        policy: Policy,
        is_cordoned: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._launcher = launcher
        self._pool = pool
        self._store = store
        self._registry = registry
        self._source = source
        self._decisions = decisions
        self._grants = grants
        self._probe = probe
        self._policy = policy
        self._is_cordoned = is_cordoned
        self._clock = clock
        self._wake = asyncio.Event()
        self._attempts: dict[Key, Attempts] = {}
        self._settled: dict[Key, int] = {}
        self._waiting: dict[Key, str] = {}
        self._granted: dict[str, float] = {}
        self._started: dict[str, Assignment] = {}
        self._kept: dict[str, float] = {}
        self._ending: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._answered_since: float | None = None
        self._running: list[Running] = []
        self._reports: dict[str, ReplicaReport] = {}
        self._generations: dict[str, int] = {}
        self._listed = False
        self.problem: str | None = None

    def take_over(self) -> None:
        """Read the last generation of each version's scratch replicas, for the names of new ones.

        The generation is the last number in a replica's name. Call this when the process becomes the leader.
        """
        found = self._decisions.generations()
        self._generations = {name: last for (name, _), last in found.items() if scratch_of(name)}

    def wake(self) -> None:
        """Look for pending versions now."""
        self._wake.set()

    async def run(self) -> None:
        """Verify pending versions until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.check()
                self.problem = None
            except (TidegateError, StoreUnavailable) as error:
                if error.message != self.problem:
                    log.warning(
                        "the autoscaler could not verify versions and tries again",
                        extra={"problem": error.message},
                    )
                self.problem = error.message
            except Exception as error:  # the next check tries again
                log.exception("verifying versions failed")
                self.problem = f"The autoscaler could not verify versions, and tries again: {error}"
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.pause_s())

    def pause_s(self) -> float:
        """Return the seconds until the next check. They are few while a verification makes progress."""
        pending = self._pending()
        if not pending:
            return KEPT_PERIOD_S if self._running else PERIOD_S
        soon = self._clock() + KEPT_PERIOD_S
        waits = any(
            key in self._waiting or (key in self._attempts and self._attempts[key].not_before > soon)
            for key in ((each.model, each.number) for each in pending)
        )
        works = any(each.replica not in self._kept for each in self._running)
        return KEPT_PERIOD_S if waits and not works else BUSY_PERIOD_S

    async def check(self) -> None:
        """Check all pending versions and scratch replicas. Start and end replicas, and write results."""
        if self._source.current is None:
            return
        pending = self._pending()
        metrics.VERIFYING.set(len(pending))
        if not pending and not self._running and self._listed:
            return
        self._running = [
            each
            for each in await self._launcher.list()
            if scratch_of(each.deployment) and not self._pool.became_replica(each.replica)
        ]
        self._listed = True
        self._drop_notes()
        now = self._clock()
        self._grant(pending, now)  # first, because the read of the store below may fail and end this check
        heard = await self._read_reports(now)
        # Leave out replicas that are already being ended, so that the outcome of a replica is counted only
        # once.
        live = [each for each in self._running if each.replica not in self._ending]
        found = plan(pending, live, self._reports, self._attempts, now, heard, self._heard)
        # If a version has a result, change its recorded attempts only after the result is written. If the
        # write fails, the next check then finds the same result.
        settled = {(each.model, each.number) for each in found.settle}
        before = {key: kept for key, kept in self._attempts.items() if key in settled}
        self._attempts = {key: kept for key, kept in found.attempts.items() if key not in settled} | before
        await self._act(found)

    def view(self) -> list[dict[str, Any]]:
        """Return the pending versions with their scratch replicas, for JSON."""
        running = {scratch_of(each.deployment): each for each in self._running if each.alive}
        found = []
        for version in self._pending():
            key = version.model, version.number
            replica = running.get(key)
            report = self._reports.get(replica.replica) if replica else None
            kept = self._attempts.get(key, Attempts(0))
            step = report.message if report else "starting" if replica else self._wait_of(key, kept)
            found.append(
                {
                    "model": version.model,
                    "version": version.number,
                    "replica": replica.replica if replica else None,
                    "step": step,
                    "failed_tries": kept.tries,
                    "last_failure": kept.message,
                }
            )
        return found

    def _wait_of(self, key: Key, kept: Attempts) -> str:
        """Return why a version has no scratch replica yet."""
        if key in self._waiting:
            return self._waiting[key]
        reason = self.problem or kept.message
        return f"waiting for the next try: {reason}" if reason else "waiting"

    def _pending(self) -> list[Version]:
        versions = self._source.current.versions if self._source.current else []
        return [
            each
            for each in versions
            if each.verification.state == "pending"
            and self._settled.get((each.model, each.number)) != each.verification.round
        ]

    def _grant(self, pending: list[Version], now: float) -> None:
        """Let the scratch replicas read their artifacts for some more seconds."""
        versions = {(each.model, each.number): each for each in pending}
        for each in self._running:
            version = versions.get(scratch_of(each.deployment) or ("", 0))
            if version is not None and now - self._granted.get(each.replica, 0.0) >= GRANT_EVERY_S:
                self._granted[each.replica] = now
                self._grants.launching(each.replica, version.artifact_sha256)

    async def _read_reports(self, now: float) -> dict[str, float]:
        """Read the heartbeats. Return, for each scratch replica, the time when it was last heard.

        This is the time of its last heartbeat. If a store outage ended later, it is the end of that outage.
        """
        try:
            self._reports = {report.replica: report for report in await self._store.replicas()}
        except StoreUnavailable:
            self._answered_since = None
            raise
        answered = self._answered_since = now if self._answered_since is None else self._answered_since
        self._heard |= {each.replica: now for each in self._running if each.replica in self._reports}
        return {each.replica: max(answered, self._heard.get(each.replica, 0.0)) for each in self._running}

    def _drop_notes(self) -> None:
        """Forget scratch replicas that have ended, or that have become replicas of a Deployment."""
        there = {each.replica for each in self._running}
        for noted in (self._granted, self._started, self._kept, self._ending, self._heard):
            for replica in noted.keys() - there:
                del noted[replica]

    def _version_of(self, replica: str) -> Key | None:
        """Return the version that a scratch replica verifies."""
        return next((scratch_of(each.deployment) for each in self._running if each.replica == replica), None)

    async def _act(self, found: ScratchPlan) -> None:
        settled = {(each.model, each.number) for each in found.settle}
        # `found.kill` has the replicas to kill. If a replica's version has no result yet, mark the replica as
        # ending before the registry is called. If that call fails, the next check does not count the outcome
        # of this replica again.
        for replica, cause in found.kill:
            if self._version_of(replica) not in settled and not self._is_kept(replica, self._clock()):
                self._ending.setdefault(replica, cause)
        for each in found.settle:
            await self._settle(each)
            if each.result.state == "verified":
                self._keep(each)
        now = self._clock()
        for replica, cause in found.kill:
            if not self._is_kept(replica, now):
                self._ending.setdefault(replica, cause)
        for replica in [each.replica for each in self._running if each.replica in self._ending]:
            await self._end(replica)
        for version in found.launch:
            await self._launch(version)

    async def _end(self, replica: str) -> None:
        """End a scratch replica, unless it has become a Deployment's replica, or may have become one."""
        if not self._pool.release_verified(replica):
            return
        log.info("ending a scratch replica", extra={"replica": replica, "cause": self._ending[replica]})
        await self._launcher.kill(replica)
        for noted in (self._granted, self._started, self._kept, self._ending):
            noted.pop(replica, None)
        with contextlib.suppress(StoreUnavailable):
            await self._store.forget_replica(replica)

    def _keep(self, verified: Settle) -> None:
        """Keep the scratch replica of a verified version. It can become the version's first replica."""
        name = deployment_of_scratch(verified.model, verified.number)
        for each in self._running:
            if each.alive and each.deployment == name and each.replica in self._started:
                self._kept[each.replica] = self._clock() + KEEP_S
                self._pool.keep_verified(self._started[each.replica])

    def _is_kept(self, replica: str, now: float) -> bool:
        alive = any(each.replica == replica and each.alive for each in self._running)
        return alive and now < self._kept.get(replica, 0.0)

    async def _settle(self, each: Settle) -> None:
        with contextlib.suppress(NotFound):  # the version was deleted
            await self._registry.put_verification(each.model, each.number, each.result)
        self._settled[each.model, each.number] = each.result.round
        metrics.VERIFICATIONS.labels(each.result.state).inc()
        self._attempts.pop((each.model, each.number), None)
        extra = {"model": each.model, "version": each.number, "state": each.result.state}
        log.info("a version was verified", extra=extra | {"reason": each.result.message})
        self._source.refresh_soon()

    async def _launch(self, version: Version) -> None:
        key = version.model, version.number
        try:
            spec, task = await self._registry.verification_task(*key)
        except NotFound:
            return
        now = self._clock()
        created = datetime.fromtimestamp(now, UTC)
        deployment = Deployment(**dict(spec), revision=0, created_at=created)
        host = await self._probe.read()
        if why := obstacle(deployment, host, self._policy, cordoned=self._is_cordoned()):
            self._waiting[key] = f"waiting: {why}"
            return
        self._waiting.pop(key, None)
        name = deployment_of_scratch(*key)
        generation = self._generations.get(name, 0) + 1
        self._decisions.save_generation(name, 0, generation)
        self._generations[name] = generation
        replica = replica_name(name, 0, generation)
        self._grants.launching(replica, version.artifact_sha256)
        self._granted[replica] = now
        assignment = Assignment(
            replica=replica,
            generation=generation,
            deployment=deployment,
            version=version,
            launched_at=now,
            scratch=task,
        )
        self._started[replica] = assignment
        self._listed = False  # the next check must list the new replica, even if no version is pending then
        try:
            await self._launcher.launch(assignment)
        except (TidegateError, OSError) as error:  # for example, the disk is full
            failed = error if isinstance(error, TidegateError) else LaunchFailed(str(error))
            log.warning("starting a scratch replica failed", extra={"problem": failed.message})
            memory, result = after_failed_launch(version, self._attempts.get(key), failed, now)
            self._attempts[key] = memory
            if result is not None:
                await self._settle(Settle(*key, result))
