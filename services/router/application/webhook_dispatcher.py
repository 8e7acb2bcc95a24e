"""Delivers webhooks: claims what is due, sends it, keeps what came of it. Only the leader claims."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client import Counter, Gauge

from services.router.adapters.webhook_sender import WebhookSender
from services.router.domain import webhooks
from services.router.domain.receiver_pacing import ReceiverPacing
from services.router.domain.webhooks import RetryPolicy, WebhookAttempt, WebhookLimits
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.protocol.webhooks import Target, read_url
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.webhooks import Due, Settled, WebhookStore

log = telemetry.logger(__name__)

POLL_S = 0.25
AWAY_S = 1.0
# What is claimed and not settled is due again after this time, or after two tries at their longest and this
# margin: whoever claimed it has died, or never heard that it had it.
LEASE_S, MARGIN_S = 30.0, 10.0
HELD = 1024
CLAIMED_AT_ONCE = 256
QUEUED_PER_HOST = 64

TRIES = Counter("tidegate_webhook_tries_total", "Webhooks sent, by what came of it.", ["outcome"])
PENDING = Gauge("tidegate_webhooks_pending", "Webhooks that wait to be sent or sent again.")


class ClaimedWebhook(NamedTuple):
    """A webhook in hand. ``until``: the monotonic time at which its claim ends."""

    due: Due
    job: Job
    target: Target
    until: float


@dataclass(slots=True)
class ReceiverQueue:
    """A receiver's lane and what waits for it here."""

    lane: ReceiverPacing
    parcels: deque[ClaimedWebhook] = field(default_factory=deque)


class WebhookDispatcher:
    """One of the router's loops."""

    def __init__(
        self,
        store: WebhookStore,
        jobs: JobStore,
        sender: WebhookSender,
        master: bytes,
        *,
        limits: WebhookLimits,
        retry_policy: RetryPolicy,
        leads: Callable[[], bool],
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._sender = sender
        self._master = master
        self._limits = limits
        self._lease_s = max(LEASE_S, 2 * limits.timeout_s + MARGIN_S)
        self._retry_policy = retry_policy
        self._leads = leads
        self._roads: dict[str, ReceiverQueue] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._settled: list[Settled] = []
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.problem: str | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="webhook dispatcher")

    async def stop(self) -> None:
        """End. What is under way is given up: its claim ends by itself and it is sent again."""
        await tasks.end(self._task, *self._under_way)
        with contextlib.suppress(StoreUnavailable):
            await self._settle()
        await self._sender.close()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause = await self._pause_after_round()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _pause_after_round(self) -> float:
        try:
            more = await self._round()
        except StoreUnavailable as error:
            if self.problem is None:
                log.warning("webhooks wait for their store", extra={"problem": error.message})
            self.problem = error.message
            return AWAY_S
        except Exception:
            log.exception("a round failed; the next one tries again")
            return AWAY_S
        self.problem = None
        return 0.0 if more else POLL_S

    async def _round(self) -> bool:
        """Settle what has ended, claim and place what is due; whether there may be more at once."""
        await self._settle()
        if not self._leads():
            PENDING.set(0)
            return False  # what is claimed is still sent while its claim lasts
        room = min(CLAIMED_AT_ONCE, HELD - sum(len(r.parcels) for r in self._roads.values()))
        if room <= 0:
            return False
        claimed_at = time.monotonic()
        due, pending = await self._store.claim(room, int(self._lease_s * 1e3))
        PENDING.set(pending)
        if due:
            jobs = await self._jobs.get_many([each.id for each in due])
            for each, job in zip(due, jobs, strict=True):
                self._place(each, job, claimed_at + self._lease_s)
            await self._settle()
        self._send_everywhere()
        self._forget_idle()
        return len(due) == room

    async def _settle(self) -> None:
        settled, self._settled = self._settled, []
        if not settled:
            return
        try:
            await self._store.settle(settled)
        except StoreUnavailable:
            self._settled = settled + self._settled
            raise

    def _place(self, due: Due, job: Job | None, until: float) -> None:
        """Into its receiver's queue, or off to another time, or over."""
        target = read_url(job.webhook) if job is not None and job.webhook and job.terminal else None
        if job is None or target is None:
            self._settled.append(Settled(due.id, due.claim))  # its record has been removed meanwhile
            return
        if self._age_s(job) > self._retry_policy.give_up_s:
            self._note(due, job, WebhookAttempt(None, "its receiver did not answer for too long", 0.0), None)
            return
        road = self._roads.get(target.origin)
        if road is None:
            road = self._roads[target.origin] = ReceiverQueue(
                ReceiverPacing(self._limits.per_host, QUEUED_PER_HOST)
            )
        if (delay := road.lane.put_off(time.monotonic())) is not None:
            self._settled.append(Settled(due.id, due.claim, again_ms=int(delay * 1e3)))
            return
        road.parcels.append(ClaimedWebhook(due, job, target, until))
        road.lane.waiting += 1

    def _send_more(self, road: ReceiverQueue) -> None:
        """Begin as many tries as may go now."""
        while (
            road.parcels
            and len(self._under_way) < self._limits.at_once
            and road.lane.may_send(time.monotonic())
        ):
            parcel = road.parcels.popleft()
            road.lane.waiting -= 1
            if parcel.until - time.monotonic() < self._limits.timeout_s:
                continue  # another router may have it before this try has ended
            road.lane.in_flight += 1
            task = asyncio.create_task(self._deliver(road, parcel))
            self._under_way.add(task)
            task.add_done_callback(self._on_ended)

    async def _deliver(self, road: ReceiverQueue, parcel: ClaimedWebhook) -> None:
        try:
            sent = await self._try(parcel)
            road.lane.ended(sent, time.monotonic(), random.random(), self._retry_policy)
            self._note(parcel.due, parcel.job, sent, random.random())
        finally:
            road.lane.in_flight -= 1
        if time.monotonic() < road.lane.rests_until:
            self._put_off_all(road)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("a webhook was not sent", exc_info=error)
            self._send_everywhere()
            self._wake.set()

    async def _try(self, parcel: ClaimedWebhook) -> WebhookAttempt:
        job = parcel.job
        body = webhooks.body_of(job.public(), job.finished_ms)
        id_ = webhooks.webhook_id(job.id.hex())
        secret = webhooks.secret_of(self._master, job.principal)
        headers = webhooks.signed_headers(secret, id_, int(time.time()), body)
        return await self._sender.post(parcel.target, body, headers)

    def _note(self, due: Due, job: Job, sent: WebhookAttempt, draw: float | None) -> None:
        """Keep what came of a try; ``draw`` None: there was none, its time was over."""
        attempt = due.tries + 1
        if draw is None:
            verdict = webhooks.RetryDecision("given_up")
        else:
            verdict = webhooks.decide(sent, attempt, self._age_s(job), draw, self._retry_policy)
        TRIES.labels(verdict.outcome).inc()
        told = {
            "webhook_id": webhooks.webhook_id(job.id.hex()),
            "attempt": attempt,
            "at": round(time.time(), 3),
            "status": sent.status,
            "problem": sent.problem or None,
            "took_ms": round(sent.took_ms, 1),
            "outcome": verdict.outcome,
            "again_in_s": round(verdict.delay_s, 1) if verdict.outcome == "retry" else None,
        }
        if verdict.outcome == "retry":
            self._settled.append(Settled(due.id, due.claim, told, int(verdict.delay_s * 1e3)))
        else:
            self._settled.append(Settled(due.id, due.claim, told, counted=verdict.outcome))

    def _put_off_all(self, road: ReceiverQueue) -> None:
        """The receiver rests from now on: what waits for it comes back later."""
        parcels, road.parcels = list(road.parcels), deque()
        road.lane.waiting = 0
        for parcel in parcels:
            delay = road.lane.put_off(time.monotonic()) or 0.0
            self._settled.append(Settled(parcel.due.id, parcel.due.claim, again_ms=int(delay * 1e3)))

    def _send_everywhere(self) -> None:
        for road in self._roads.values():
            self._send_more(road)

    def _forget_idle(self) -> None:
        now = time.monotonic()
        for origin in [origin for origin, road in self._roads.items() if road.lane.is_idle(now)]:
            del self._roads[origin]

    @staticmethod
    def _age_s(job: Job) -> float:
        return max(0.0, time.time() - job.finished_ms / 1e3)
