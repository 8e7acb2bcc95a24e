"""The warm pool: workers that run Triton without a model, and become replicas without a cold start.

For the rest of the autoscaler, the warm pool is a launcher. A replica from the pool has two names: its own
name, and the name of the worker. The real launcher knows only the worker's name. The first claim in the store
decides which worker becomes the replica. If no worker claims the replica, the autoscaler claims it and starts
a worker as usual. So a late, lost or duplicate offer never makes two replicas of one name.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.adapters.warm_offers import WarmOffers
from services.autoscaler.application.warm_claims import NOBODY, WarmClaims
from services.autoscaler.domain.launcher import (
    Launcher,
    LaunchSpec,
    Running,
    deployment_of_pool,
    parse_replica,
    pool_of,
    replica_name,
)
from services.autoscaler.domain.verification import fits, scratch_of
from services.autoscaler.domain.warm_pool import (
    PoolFailures,
    PoolMemory,
    PoolPlan,
    WarmClaim,
    as_replica,
    plan_pool,
    pool_for,
)
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.warm_pool import WarmAssignment, WarmPoolSpec
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

# In a class with a method `list`, `list[...]` would mean this method. These names avoid that.
Replicas = list[Running]
Views = list[dict[str, Any]]

PERIOD_S = 1.0
VERIFIED = " verified"  # a key of `_offered`, for scratch replicas; the other keys are names of pools
OFFER_S = 2.0  # the longest wait, in seconds, to send an offer, and again for a worker's claim
CLAIM_POLL_S = 0.005
REFILL_AFTER_S = 3.0  # seconds without starts after a worker became a replica, so that its model loads first
PAUSE_S = 30.0  # pause of a pool after a failed offer or start


class WarmPool:
    """A :class:`Launcher` that first tries workers of warm pools, and then the real launcher."""

    def __init__(
        self,
        launcher: Launcher,
        store: Store,
        decision_store: DecisionStore,
        offers: WarmOffers,
        grants: ReplicaGrants,
        pools: Mapping[str, WarmPoolSpec],
        log_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._launcher = launcher
        self._store = store
        self._decision_store = decision_store
        self._offers = offers
        self._grants = grants
        self._pools = pools
        self._logs = ReplicaLogs(log_dir)
        self._clock = clock
        self._claims = WarmClaims(store, decision_store, clock)
        self._generations: dict[str, int] = {}
        self._waiting: Replicas = []
        self._memory = PoolMemory()
        self._idle: dict[str, set[str]] = {}
        self._offered: Counter[str] = Counter()
        self._no_offer_before: dict[str, float] = {}
        self._answered_since: float | None = None
        self._refill_at = 0.0
        self._verified: dict[str, Assignment] = {}
        self.problem: str | None = None

    def take_over(self) -> None:
        """Read the claims, and the last generation of each pool's workers.

        The generation is the last number in a worker's name. Call this when the process becomes the leader.
        """
        self._claims.take_over()
        self._generations = {
            name: last for (name, _), last in self._decision_store.generations().items() if pool_of(name)
        }

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Make a waiting worker the replica, or start a new worker with the real launcher.

        A new worker starts only if no waiting worker takes the replica. Raise the errors of the real
        launcher.
        """
        if isinstance(assignment, Assignment):
            if await self._take_verified(assignment):
                return
            pool = pool_for(assignment.deployment, self._pools)
            if pool is not None and await self._take_from(pool, assignment):
                return
        await self._launcher.launch(assignment)

    async def drain(self, replica: str) -> None:
        """Let the worker finish its work and exit."""
        await self._launcher.drain(self._claims.worker_of(replica))

    async def kill(self, replica: str) -> None:
        """Kill the worker and everything that it started, and remove its remains."""
        await self._launcher.kill(self._claims.worker_of(replica))
        self._claims.drop(replica)

    async def output(self, replica: str, lines: int) -> str:
        """Return the last lines of a replica's output."""
        return await self._launcher.output(self._claims.worker_of(replica), lines)

    def keep_verified(self, scratch: Assignment) -> None:
        """Keep a verified version's scratch replica. A later launch of this version can use it."""
        self._verified[scratch.replica] = scratch

    def release_verified(self, worker: str) -> bool:
        """Stop keeping a scratch replica. Return False if it is or may be a Deployment's replica now."""
        self._verified.pop(worker, None)
        return not (self._in_doubt or worker in self._claims.workers)

    def became_replica(self, worker: str) -> bool:
        """Return True if a scratch replica has become a replica of a Deployment."""
        return worker in self._claims.workers

    @property
    def waiting(self) -> Replicas:
        """Return the workers that waited for a model when the replicas were last listed."""
        return self._waiting

    async def list(self) -> Replicas:
        """Return every replica that exists. Leave out waiting workers and scratch replicas."""
        rows = await self._launcher.list()
        if not any(self._offered.values()):
            await self._claims.settle()
        self._claims.drop_ended({row.replica for row in rows})
        taken = self._claims.workers
        found: Replicas = []
        self._waiting = []
        for row in rows:
            claim = taken.get(row.replica)
            parsed = parse_replica(claim.replica) if claim else None
            if claim is not None and parsed is not None:
                found.append(as_replica(row, claim, parsed))
            elif scratch_of(row.deployment) is not None:
                continue
            elif pool_of(row.deployment) is None:
                found.append(row)
            else:
                self._waiting.append(row)
        return sorted(found, key=lambda each: each.replica)

    async def hold(self, may_start: Callable[[], bool]) -> None:
        """Keep the pools filled until cancelled."""
        while True:
            try:
                await self.check(may_start())
                self.problem = None
            except Unavailable as error:
                if error.message != self.problem:
                    log.warning(
                        "the warm pool could not be checked; the autoscaler tries again",
                        extra={"problem": error.message},
                    )
                self.problem = error.message
            except Exception as error:  # the next check tries again
                log.exception("checking the warm pool failed")
                self.problem = f"The last check of the warm pool failed: {error}"
            await asyncio.sleep(PERIOD_S)

    async def check(self, may_start: bool = True) -> None:
        """Check the waiting workers. End failed and surplus workers, and start missing ones."""
        await self.list()
        reports = await self._reports()
        now = self._clock()
        # A worker may have been claimed since it was listed.
        claimed = self._claims.workers
        waiting = [worker for worker in self._waiting if worker.replica not in claimed]
        assert self._answered_since is not None
        plan, memory = plan_pool(self._pools, waiting, reports, self._memory, now, self._answered_since)
        if self._in_doubt:
            return
        self._memory = memory
        self._idle = {pool: set(workers) for pool, workers in plan.idle.items()}
        for pool, workers in self._idle.items():
            metrics.WARM_WORKERS.labels(pool).set(len(workers))
        await self._act(plan, may_start and self._clock() >= self._refill_at)

    def view(self) -> Views:
        """Return every pool with its waiting workers, for JSON. ``flavour`` is an older name of ``pool``."""
        return [
            {
                "pool": name,
                "flavour": name,
                **pool.model_dump(mode="json"),
                "ready": sorted(self._idle.get(name, ())),
                "there": sum(pool_of(each.deployment) == name for each in self._waiting),
                "problem": self._memory.failures.get(name, PoolFailures()).message,
            }
            for name, pool in sorted(self._pools.items())
        ]

    @property
    def _in_doubt(self) -> bool:
        """Return True if a worker that seems to wait may already be a replica."""
        return any(self._offered.values()) or self._claims.open

    async def _reports(self) -> dict[str, ReplicaReport]:
        """Return the heartbeats of workers. A store outage is not counted as missed heartbeats."""
        try:
            found = {report.replica: report for report in await self._store.replicas()}
        except StoreUnavailable:
            self._answered_since = None
            raise
        if self._answered_since is None:
            self._answered_since = self._clock()
        return found

    # -- offers ----------------------------------------------------------------------------------------------

    async def _take_from(self, pool: str, assignment: Assignment) -> bool:
        """Offer a replica to a pool. Return True if a worker took it.

        Raise ``Unavailable`` if it is not known whether a worker took the replica.
        """
        if len(self._idle.get(pool, ())) <= self._offered[pool]:
            metrics.WARM_GIVEN.labels(pool, "none waits").inc()
            return False
        if self._clock() < self._no_offer_before.get(pool, 0.0):
            return False
        self._offered[pool] += 1
        try:
            worker = await self._offer(pool, assignment)
        except StoreUnavailable:
            self._no_offer_before[pool] = self._clock() + PAUSE_S
            raise
        finally:
            self._offered[pool] -= 1
        metrics.WARM_GIVEN.labels(pool, "given" if worker else "not taken").inc()
        if worker is None:
            self._no_offer_before[pool] = self._clock() + PAUSE_S
            return False
        self._refill_at = self._clock() + REFILL_AFTER_S
        self._idle[pool].discard(worker)
        return True

    async def _take_verified(self, assignment: Assignment) -> bool:
        """Let a kept scratch replica become the replica of ``assignment``. Return False if none did."""
        worker = next((name for name, each in self._verified.items() if fits(each, assignment)), None)
        if worker is None:
            return False
        del self._verified[worker]
        offer = assignment.model_dump_json()
        self._offered[VERIFIED] += 1
        try:
            return (
                await self._offered_to(assignment, lambda: self._store.offer_replica(worker, offer, OFFER_S))
                is not None
            )
        finally:
            self._offered[VERIFIED] -= 1

    async def _offer(self, pool: str, assignment: Assignment) -> str | None:
        return await self._offered_to(assignment, lambda: self._offers.offer(pool, assignment, OFFER_S))

    async def _offered_to(self, assignment: Assignment, send: Callable[[], Awaitable[None]]) -> str | None:
        """Send an offer. Return the worker that became the replica; None if no worker did."""
        start = LaunchSpec.of(assignment)
        try:
            await self._store.claimant(start.replica)
        except StoreUnavailable:
            return None  # without the store, no worker can claim the replica
        claim = WarmClaim(start.replica, start.fingerprint, start.launched_at, start.drain_limit_s)
        self._claims.save(claim)
        try:
            async with asyncio.timeout(OFFER_S):
                await send()
            worker = await self._claimant(start.replica)
        except StoreUnavailable:
            raise
        except (Unavailable, TimeoutError) as error:
            log.warning(
                "a replica could not be offered to the warm pool",
                extra={"problem": str(error) or "no confirm"},
            )
            worker = await self._store.claim_replica(start.replica, NOBODY)
        if worker == NOBODY:
            self._claims.drop(start.replica)
            return None
        self._claims.save(replace(claim, worker=worker))
        self._grants.launching(worker, assignment.version.artifact_sha256)
        self._link_log(start.replica, worker)
        log.info(
            "a worker of the warm pool became a replica", extra={"replica": start.replica, "worker": worker}
        )
        return worker

    async def _claimant(self, replica: str) -> str:
        """Return the worker that claimed the replica.

        After ``OFFER_S`` seconds, claim the replica for the autoscaler (``NOBODY``), so that no worker can
        take it later.
        """
        deadline = self._clock() + OFFER_S
        while self._clock() < deadline:
            if worker := await self._store.claimant(replica):
                return worker
            await asyncio.sleep(CLAIM_POLL_S)
        return await self._store.claim_replica(replica, NOBODY)

    def _link_log(self, replica: str, worker: str) -> None:
        """Make the worker's log available under the replica's name."""
        with contextlib.suppress(OSError):
            self._logs.path(replica).symlink_to(self._logs.path(worker).name)

    # -- refilling -------------------------------------------------------------------------------------------

    async def _act(self, plan: PoolPlan, may_start: bool) -> None:
        for worker, cause in plan.kill:
            if self._in_doubt or worker in self._claims.workers:
                return  # the worker is a replica now, or may be one
            log.info("ending a worker of the warm pool", extra={"worker": worker, "cause": cause})
            await self._launcher.kill(worker)
            with contextlib.suppress(StoreUnavailable):
                await self._store.forget_replica(worker)
        for pool in plan.launch if may_start else ():
            await self._start(pool)

    async def _start(self, pool: str) -> None:
        name = deployment_of_pool(pool)
        generation = self._generations.get(name, 0) + 1
        self._decision_store.save_generation(name, 0, generation)
        self._generations[name] = generation
        worker = replica_name(name, 0, generation)
        assignment = WarmAssignment(
            replica=worker,
            generation=generation,
            pool_name=pool,
            pool=self._pools[pool],
            launched_at=self._clock(),
        )
        try:
            await self._launcher.launch(assignment)
        except TidegateError as error:
            failed = PoolFailures(1, self._clock() + PAUSE_S, error.message)
            failures = {**self._memory.failures, pool: failed}
            self._memory = PoolMemory(self._memory.heartbeats, failures)
            log.warning("a worker of the warm pool could not be started", extra={"problem": error.message})
