"""Deliver webhooks: claim the due webhooks in the store, send them, and store the results.

Only the leader claims.
"""

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
from tidegate.kernel.protocol.webhooks import WebhookTarget, read_url
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.webhooks import Due, Settled, WebhookStore

log = telemetry.logger(__name__)

POLL_S = 0.25
RETRY_S = 1.0
# The leader claims a webhook for LEASE_S seconds, or for 2 * timeout + MARGIN_S seconds if that is longer
# (timeout: the timeout of an attempt). If the outcome of the attempt is not stored in this time, the webhook
# is due again. The reason can be that the router died, or that it got no response from the store.
LEASE_S, MARGIN_S = 30.0, 10.0
MAX_QUEUED = 1024
CLAIMED_AT_ONCE = 256
QUEUED_PER_RECEIVER = 64

TRIES = Counter("tidegate_webhook_tries_total", "Attempts to send webhooks, by outcome.", ["outcome"])
PENDING = Gauge("tidegate_webhooks_pending", "Webhooks that wait to be sent or sent again.")


class ClaimedWebhook(NamedTuple):
    """A webhook that this router has claimed. ``until``: the monotonic time at which the claim ends."""

    due: Due
    job: Job
    target: WebhookTarget
    until: float


@dataclass(slots=True)
class ReceiverQueue:
    """The claimed webhooks of one receiver. ``pacing``: the receiver's load and failures."""

    pacing: ReceiverPacing
    webhooks: deque[ClaimedWebhook] = field(default_factory=deque)


class WebhookDispatcher:
    """One of the router's loops. It sends the webhooks of finished jobs."""

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
        self._queues: dict[str, ReceiverQueue] = {}
        self._in_flight: set[asyncio.Task[None]] = set()
        self._settled: list[Settled] = []
        self._loop = RepeatingTask("webhook dispatcher", self._step, retry_s=RETRY_S)
        self.problem: str | None = None

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop, and cancel the attempts in flight.

        Their webhooks are sent again when the claims end.
        """
        await self._loop.stop()
        await tasks.end(*self._in_flight)
        with contextlib.suppress(StoreUnavailable):
            await self._settle()
        await self._sender.close()

    async def _step(self) -> float:
        try:
            more = await self._round()
        except StoreUnavailable as error:
            if self.problem is None:
                log.warning(
                    "the store of webhooks does not answer; trying again", extra={"problem": error.message}
                )
            self.problem = error.message
            return RETRY_S
        self.problem = None
        return 0.0 if more else POLL_S

    async def _round(self) -> bool:
        """Store results, claim due webhooks and queue them. Return True if more webhooks may be due."""
        await self._settle()
        if not self._leads():
            PENDING.set(0)
            return False  # the router still sends the webhooks that it has claimed
        room = min(CLAIMED_AT_ONCE, MAX_QUEUED - sum(len(q.webhooks) for q in self._queues.values()))
        if room <= 0:
            return False
        claimed_at = time.monotonic()
        due, pending = await self._store.claim(room, int(self._lease_s * 1e3))
        PENDING.set(pending)
        if due:
            jobs = await self._jobs.get_many([each.id for each in due])
            for each, job in zip(due, jobs, strict=True):
                self._queue(each, job, claimed_at + self._lease_s)
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

    def _queue(self, due: Due, job: Job | None, until: float) -> None:
        """Queue a webhook for its receiver, postpone it, or give up on it."""
        target = read_url(job.webhook) if job is not None and job.webhook and job.terminal else None
        if job is None or target is None:
            self._settled.append(Settled(due.id, due.claim))  # the job's record was removed meanwhile
            return
        if self._age_s(job) > self._retry_policy.give_up_s:
            problem = f"given up {self._retry_policy.give_up_s:g} s after the end of the job"
            attempt = WebhookAttempt(None, problem, 0.0)
            self._record(due, job, attempt, webhooks.RetryDecision("given_up"))
            return
        queue = self._queues.get(target.origin)
        if queue is None:
            pacing = ReceiverPacing(self._limits.per_host, QUEUED_PER_RECEIVER)
            queue = self._queues[target.origin] = ReceiverQueue(pacing)
        if (delay := queue.pacing.postpone(time.monotonic())) is not None:
            self._settled.append(Settled(due.id, due.claim, again_ms=int(delay * 1e3)))
            return
        queue.webhooks.append(ClaimedWebhook(due, job, target, until))
        queue.pacing.waiting += 1

    def _send_more(self, queue: ReceiverQueue) -> None:
        """Start as many attempts as the limits and the receiver's pacing allow now."""
        while (
            queue.webhooks
            and len(self._in_flight) < self._limits.max_in_flight
            and queue.pacing.may_send(time.monotonic())
        ):
            webhook = queue.webhooks.popleft()
            queue.pacing.waiting -= 1
            if webhook.until - time.monotonic() < self._limits.timeout_s:
                continue  # the claim could end during the attempt; after the claim, the webhook is due again
            queue.pacing.in_flight += 1
            task = asyncio.create_task(self._deliver(queue, webhook))
            self._in_flight.add(task)
            task.add_done_callback(self._on_done)

    async def _deliver(self, queue: ReceiverQueue, webhook: ClaimedWebhook) -> None:
        try:
            attempt = await self._send(webhook)
            queue.pacing.record(attempt, time.monotonic(), random.random(), self._retry_policy)
            due, job = webhook.due, webhook.job
            decision = webhooks.decide(
                attempt, due.tries + 1, self._age_s(job), random.random(), self._retry_policy
            )
            self._record(due, job, attempt, decision)
        finally:
            queue.pacing.in_flight -= 1
        if time.monotonic() < queue.pacing.paused_until:
            self._postpone_all(queue)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            if (error := task.exception()) is not None:
                log.error("a webhook was not sent", exc_info=error)
            self._send_everywhere()
            self._loop.wake()

    async def _send(self, webhook: ClaimedWebhook) -> WebhookAttempt:
        job = webhook.job
        body = webhooks.body_of(job.public(), job.finished_ms)
        id_ = webhooks.webhook_id(job.id.hex())
        secret = webhooks.secret_of(self._master, job.principal)
        headers = webhooks.signed_headers(secret, id_, int(time.time()), body)
        return await self._sender.post(webhook.target, body, headers)

    def _record(self, due: Due, job: Job, attempt: WebhookAttempt, decision: webhooks.RetryDecision) -> None:
        """Queue the result of an attempt for :meth:`_settle`, which stores it."""
        TRIES.labels(decision.outcome).inc()
        retry = decision.outcome == "retry"
        entry = {
            "webhook_id": webhooks.webhook_id(job.id.hex()),
            "attempt": due.tries + 1,
            "at": round(time.time(), 3),
            "status": attempt.status,
            "problem": attempt.problem or None,
            "took_ms": round(attempt.took_ms, 1),
            "outcome": decision.outcome,
            "again_in_s": round(decision.delay_s, 1) if retry else None,
        }
        if retry:
            self._settled.append(Settled(due.id, due.claim, entry, int(decision.delay_s * 1e3)))
        else:
            self._settled.append(Settled(due.id, due.claim, entry, counted=decision.outcome))

    def _postpone_all(self, queue: ReceiverQueue) -> None:
        """Postpone all queued webhooks of a receiver that is paused now."""
        postponed, queue.webhooks = list(queue.webhooks), deque()
        queue.pacing.waiting = 0
        for webhook in postponed:
            delay = queue.pacing.postpone(time.monotonic()) or 0.0
            self._settled.append(Settled(webhook.due.id, webhook.due.claim, again_ms=int(delay * 1e3)))

    def _send_everywhere(self) -> None:
        for queue in self._queues.values():
            self._send_more(queue)

    def _forget_idle(self) -> None:
        now = time.monotonic()
        for origin in [origin for origin, queue in self._queues.items() if queue.pacing.is_idle(now)]:
            del self._queues[origin]

    @staticmethod
    def _age_s(job: Job) -> float:
        return max(0.0, time.time() - job.finished_ms / 1e3)
