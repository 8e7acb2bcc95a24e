"""The warm pool: workers with Triton up and no model, given away where a replica is to start.

To the rest of the autoscaler it is a launcher. A replica that a waiting worker took has two names: its own,
and the worker's, by which the launcher underneath knows it. Who took it is settled in the store, where the
first to say so stays: a worker, or the autoscaler for "nobody did", which then starts one as ever. So an
offer that is late, lost or delivered twice never makes two of one name.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.adapters.warm_offers import WarmOffers
from services.autoscaler.domain.launcher import (
    Launcher,
    LaunchSpec,
    Running,
    deployment_of_pool,
    parse_replica,
    pool_of,
    replica_name,
)
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
from tidegate.kernel.protocol.models import Assignment, WarmAssignment, WarmPoolSpec
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

# Inside a class with a method `list` the builtin of that name cannot be written as a type.
Replicas = list[Running]
Views = list[dict[str, Any]]

PERIOD_S = 1.0
OFFER_S = 2.0  # a worker that waits takes one within milliseconds; the round waits for it
ASK_EVERY_S = 0.005
SETTLE_S = 10.0  # an offer of a former leader that nobody is known to have taken by then was not taken
REFILL_AFTER_S = 3.0  # the start that was just helped along goes before its successor's
MISTRUST_S = 30.0  # after an offer that nobody took
NOBODY = "autoscaler"


class WarmPool:
    """See :class:`services.autoscaler.domain.launcher.Launcher`; with no flavours it only passes on."""

    def __init__(
        self,
        launcher: Launcher,
        store: Store,
        ledger: DecisionStore,
        offers: WarmOffers,
        grants: ReplicaGrants,
        flavours: Mapping[str, WarmPoolSpec],
        log_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._launcher = launcher
        self._store = store
        self._ledger = ledger
        self._offers = offers
        self._grants = grants
        self._flavours = flavours
        self._logs = ReplicaLogs(log_dir)
        self._clock = clock
        self._claims: dict[str, WarmClaim] = {}
        self._generations: dict[str, int] = {}
        self._waiting: Replicas = []
        self._memory = PoolMemory()
        self._idle: dict[str, set[str]] = {}
        self._offered: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._answered_since: float | None = None
        self._refill_at = 0.0
        self.problem: str | None = None

    def take_over(self) -> None:
        """Read what the former leader left; to be called once this process leads."""
        self._claims = {claim.replica: claim for claim in self._ledger.claims()}
        self._generations = {
            name: last for (name, _), last in self._ledger.generations().items() if pool_of(name)
        }

    async def launch(self, assignment: Assignment | WarmAssignment) -> None:
        """Give the replica to a worker that waits, or start one. Raises as the launcher underneath does."""
        if isinstance(assignment, Assignment):
            flavour = pool_for(assignment.deployment, self._flavours)
            if flavour is not None and await self._give(flavour, assignment):
                return
        await self._launcher.launch(assignment)

    async def drain(self, replica: str) -> None:
        """Ask the worker to finish what it holds and exit."""
        await self._launcher.drain(self._worker(replica))

    async def kill(self, replica: str) -> None:
        """End the worker with everything it started, and clear its remains."""
        await self._launcher.kill(self._worker(replica))
        self._drop(replica)

    async def output(self, replica: str, lines: int) -> str:
        """Return the end of a replica's output, wherever that began."""
        return await self._launcher.output(self._worker(replica), lines)

    async def list(self) -> Replicas:
        """Every replica that exists; workers that wait are none."""
        rows = await self._launcher.list()
        await self._settle()
        self._forget_ended({row.replica for row in rows})
        taken = {claim.worker: claim for claim in self._claims.values() if claim.worker}
        found: Replicas = []
        self._waiting = []
        for row in rows:
            claim = taken.get(row.replica)
            parsed = parse_replica(claim.replica) if claim else None
            if claim is not None and parsed is not None:
                found.append(as_replica(row, claim, parsed))
            elif pool_of(row.deployment) is None:
                found.append(row)
            else:
                self._waiting.append(row)
        return sorted(found, key=lambda each: each.replica)

    async def hold(self, may_start: Callable[[], bool]) -> None:
        """Keep the pool filled, for ever."""
        while True:
            try:
                await self.look(may_start())
                self.problem = None
            except Unavailable as error:
                if error.message != self.problem:
                    log.warning("the warm pool is left as it is", extra={"problem": error.message})
                self.problem = error.message
            except Exception as error:  # it must outlive whatever one look met
                log.exception("the warm pool's look failed")
                self.problem = f"The last look at the warm pool failed: {error}"
            await asyncio.sleep(PERIOD_S)

    async def look(self, may_start: bool = True) -> None:
        """One look at those that wait: end what is not wanted or not well, start what is missing."""
        await self.list()
        reports = await self._reports()
        now = self._clock()
        given = {claim.worker for claim in self._claims.values()}  # one may have been, since it was listed
        waiting = [worker for worker in self._waiting if worker.replica not in given]
        assert self._answered_since is not None
        plan, memory = plan_pool(self._flavours, waiting, reports, self._memory, now, self._answered_since)
        if self._in_doubt:
            return
        self._memory = memory
        self._idle = {flavour: set(workers) for flavour, workers in plan.idle.items()}
        for flavour, workers in self._idle.items():
            metrics.WARM_WORKERS.labels(flavour).set(len(workers))
        await self._act(plan, may_start and self._clock() >= self._refill_at)

    def view(self) -> Views:
        """Every flavour with what waits, for JSON."""
        return [
            {
                "flavour": name,
                **flavour.model_dump(mode="json"),
                "ready": sorted(self._idle.get(name, ())),
                "there": sum(pool_of(each.deployment) == name for each in self._waiting),
                "problem": self._memory.trouble.get(name, PoolFailures()).message,
            }
            for name, flavour in sorted(self._flavours.items())
        ]

    @property
    def _in_doubt(self) -> bool:
        """Whether one of those that seem to wait may be a replica already."""
        return any(self._offered.values()) or any(not claim.worker for claim in self._claims.values())

    async def _reports(self) -> dict[str, ReplicaReport]:
        """What the workers say. While the store was away nobody was heard: that is no silence of theirs."""
        try:
            found = {report.replica: report for report in await self._store.replicas()}
        except StoreUnavailable:
            self._answered_since = None
            raise
        if self._answered_since is None:
            self._answered_since = self._clock()
        return found

    # -- giving away -----------------------------------------------------------------------------------------

    async def _give(self, flavour: str, assignment: Assignment) -> bool:
        """Whether a worker that waits took the replica. Raises ``Unavailable`` when that is not known."""
        if len(self._idle.get(flavour, ())) <= self._offered[flavour]:
            metrics.WARM_GIVEN.labels(flavour, "none waits").inc()
            return False
        if self._clock() < self._not_before.get(flavour, 0.0):
            return False
        self._offered[flavour] += 1
        try:
            worker = await self._offer(flavour, assignment)
        except StoreUnavailable:
            self._not_before[flavour] = self._clock() + MISTRUST_S
            raise
        finally:
            self._offered[flavour] -= 1
        metrics.WARM_GIVEN.labels(flavour, "given" if worker else "not taken").inc()
        if worker is None:
            self._not_before[flavour] = self._clock() + MISTRUST_S
            return False
        self._refill_at = self._clock() + REFILL_AFTER_S
        self._idle[flavour].discard(worker)
        return True

    async def _offer(self, flavour: str, assignment: Assignment) -> str | None:
        start = LaunchSpec.of(assignment)
        try:
            await self._store.claimant(start.replica)
        except StoreUnavailable:
            return None  # nobody could settle who takes it, so it is not offered
        claim = WarmClaim(start.replica, start.fingerprint, start.launched_at, start.drain_limit_s)
        self._note(claim)
        try:
            async with asyncio.timeout(OFFER_S):
                await self._offers.offer(flavour, assignment, OFFER_S)
            worker = await self._taker(start.replica)
        except StoreUnavailable:
            raise
        except (Unavailable, TimeoutError) as error:
            log.warning("the warm pool was not reached", extra={"problem": str(error) or "no confirm"})
            worker = await self._store.claim_replica(start.replica, NOBODY)
        if worker == NOBODY:
            self._drop(start.replica)
            return None
        self._note(replace(claim, worker=worker))
        self._grants.launching(worker, assignment.version.artifact_sha256)
        self._link_log(start.replica, worker)
        log.info("given to a worker that waited", extra={"replica": start.replica, "worker": worker})
        return worker

    async def _taker(self, replica: str) -> str:
        """Who takes it, as soon as somebody did."""
        deadline = self._clock() + OFFER_S
        while self._clock() < deadline:
            if worker := await self._store.claimant(replica):
                return worker
            await asyncio.sleep(ASK_EVERY_S)
        return await self._store.claim_replica(replica, NOBODY)

    def _link_log(self, replica: str, worker: str) -> None:
        """Let people find the output of the replica by its name."""
        with contextlib.suppress(OSError):
            self._logs.path(replica).symlink_to(self._logs.path(worker).name)

    # -- remembering -----------------------------------------------------------------------------------------

    def _note(self, claim: WarmClaim) -> None:
        self._claims[claim.replica] = claim
        self._ledger.save_claim(claim)

    def _drop(self, replica: str) -> None:
        if self._claims.pop(replica, None) is not None:
            self._ledger.drop_claim(replica)

    def _worker(self, replica: str) -> str:
        claim = self._claims.get(replica)
        return claim.worker if claim is not None and claim.worker else replica

    def _forget_ended(self, there: set[str]) -> None:
        for claim in [*self._claims.values()]:
            if claim.worker and claim.worker not in there:
                self._drop(claim.replica)

    async def _settle(self) -> None:
        """Learn who took what a former leader, or we with the store away, had offered."""
        under_way = any(self._offered.values())
        for claim in [*self._claims.values()]:
            if claim.worker or under_way:
                continue
            try:
                worker = await self._store.claimant(claim.replica)
                if worker is None and self._clock() - claim.launched_at > SETTLE_S:
                    worker = await self._store.claim_replica(claim.replica, NOBODY)
            except StoreUnavailable:
                return
            if worker is not None and worker != NOBODY:
                self._note(
                    WarmClaim(
                        claim.replica, claim.fingerprint, claim.launched_at, claim.drain_limit_s, worker
                    )
                )
            elif worker == NOBODY:
                self._drop(claim.replica)

    # -- refilling -------------------------------------------------------------------------------------------

    async def _act(self, plan: PoolPlan, may_start: bool) -> None:
        for worker, cause in plan.kill:
            if self._in_doubt or worker in {claim.worker for claim in self._claims.values()}:
                return  # given away while others were ended
            log.info("a waiting worker is ended", extra={"worker": worker, "cause": cause})
            await self._launcher.kill(worker)
            with contextlib.suppress(StoreUnavailable):
                await self._store.forget_replica(worker)
        for flavour in plan.launch if may_start else ():
            await self._start(flavour)

    async def _start(self, flavour: str) -> None:
        name = deployment_of_pool(flavour)
        generation = self._generations.get(name, 0) + 1
        self._ledger.save_generation(name, 0, generation)
        self._generations[name] = generation
        worker = replica_name(name, 0, generation)
        given = WarmAssignment(
            replica=worker,
            generation=generation,
            flavour=flavour,
            pool=self._flavours[flavour],
            launched_at=self._clock(),
        )
        try:
            await self._launcher.launch(given)
        except TidegateError as error:
            failed = PoolFailures(1, self._clock() + MISTRUST_S, error.message)
            trouble = {**self._memory.trouble, flavour: failed}
            self._memory = PoolMemory(self._memory.heard, trouble)
            log.warning("a waiting worker was not started", extra={"problem": error.message})
