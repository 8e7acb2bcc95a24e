"""Copy answered requests to a shadow, and compare the answers, without delaying any request.

A copy is made after the answer was sent. It waits in a bounded queue of this process until the shadow has an
idle replica. A thread compares a limited number of answers per second. Callers never see copies. Limits,
usage, request metrics and the counts of rollouts do not include copies.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import orjson

from services.gateway.adapters.copy_publisher import Copy, CopyPublisher
from services.gateway.domain import shadow_policy as policy
from services.gateway.domain.comparison import Comparison, Output, compare
from services.gateway.domain.contract import Decoded
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, RouteTable, ShadowRoute
from services.gateway.domain.shadow_counts import ShadowCounter, answer, compared, fail, refuse
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Tensor
from tidegate.kernel.protocol.shadow import ShadowCounts
from tidegate.kernel.token_bucket import TokenBucket

log = telemetry.logger(__name__)

# Copies are collected for this many seconds and sent in one step, so that answers to callers are sent first.
COLLECT_S = 0.002
# The pause between two rounds. A round drops copies that waited too long, and compares answers.
ROUND_S = 0.1


class Answered(Protocol):
    """The parts of a model's answer that a comparison uses."""

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The descriptions of the outputs, in the same order as their values in ``reply.data``."""

    @property
    def reply(self) -> Reply:
        """The reply of the worker."""


A = TypeVar("A", bound=Answered)


@dataclass(slots=True)
class _Pair:
    """An answered request and its copy. ``size``: the bytes of the request and its answer together."""

    shadow: ShadowRoute
    counts: ShadowCounts
    endpoint: str
    request: str
    outputs: list[Output]
    size: int
    seconds: float
    call_s: float
    copy: Copy
    since: float
    sent: float = 0.0
    answer: list[Output] | None = None


class ShadowTraffic:
    """The shadow traffic of one gateway process.

    The calling code creates this object on the event loop, and then calls :meth:`start`.
    """

    def __init__(
        self,
        publisher: CopyPublisher,
        *,
        fleet: Callable[[str], ReplicaFleet],
        outstanding: Callable[[str], int],
        gateways: Callable[[], int],
        wake: Callable[[DeploymentRoute], None],
        table: Callable[[], RouteTable | None],
        count: Callable[[str, str], None],
        largest: int,
        host_busy: float = 1.0,
    ) -> None:
        """``outstanding`` returns the number of this gateway's requests to a Deployment.

        ``wake`` requests a replica. ``count`` updates the metrics: it is called with the endpoint and the
        outcome of each copy. ``largest``: the largest request or answer that is copied, in bytes.
        ``host_busy``: a share of a host's cores. While a larger share of the cores is busy, no copy is sent.
        """
        self._publisher = publisher
        self._fleet = fleet
        self._outstanding = outstanding
        self._gateways = gateways
        self._wake = wake
        self._table = table
        self._seen: RouteTable | None = None
        self._count = count
        self._largest = min(largest, policy.LARGEST)
        self._host_busy = host_busy
        self._counter = ShadowCounter()
        self._buckets: dict[str, tuple[float, TokenBucket]] = {}
        self._memory = MemoryBudget(policy.MEMORY)
        self._waiting: dict[str, deque[_Pair]] = {}
        self._answered: deque[_Pair] = deque()
        self._compare_bucket = TokenBucket(policy.COMPARED_PER_S, policy.COMPARED_PER_S)
        self._thread = ThreadPoolExecutor(1, "shadow")
        self._due = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the background task that sends and drops copies and compares answers."""
        self._task = asyncio.create_task(self._run(), name="shadow traffic")

    async def stop(self) -> None:
        """End the background task, and cancel the comparisons that have not started."""
        await tasks.end(self._task)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def report(self) -> dict[str, ShadowCounts]:
        """Return the counts of the endpoints that have a shadow now."""
        table = self._table()
        if table is not self._seen and table is not None:
            self._seen = table
            shadows = {name: e.shadow.key for name, e in table.endpoints.items() if e.shadow is not None}
            self._counter.keep(shadows)
            self._buckets = {name: each for name, each in self._buckets.items() if name in shadows}
        return self._counter.report()

    def watch(
        self,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        request: Decoded,
        trace: bytes,
        timeout_ms: float,
        done: Callable[[A | TidegateError], None],
    ) -> Callable[[A | TidegateError], None]:
        """Return the callback for a request's outcome.

        If the request is not selected for the shadow, return ``done``. Otherwise, the callback calls ``done``
        and then queues a copy for the shadow.
        """
        shadow = endpoint.shadow
        if shadow is None or shadow.deployment.name == route.name:
            return done
        if shadow.rate < 100 and random.random() * 100 >= shadow.rate:
            return done
        if shadow.until is not None and time.time() >= shadow.until:
            return done
        asked = sum(map(len, request.data))
        if asked > self._largest:
            request = request.without_data()  # too large for a copy, so do not keep the tensors in memory
        started = time.perf_counter()

        def answered(outcome: A | TidegateError) -> None:
            seconds = time.perf_counter() - started
            done(outcome)
            if not isinstance(outcome, TidegateError):
                self._offer(endpoint.name, shadow, request, asked, trace, timeout_ms, outcome, seconds)

        return answered

    def _offer(
        self,
        endpoint: str,
        shadow: ShadowRoute,
        request: Decoded,
        asked: int,
        trace: bytes,
        timeout_ms: float,
        result: Answered,
        seconds: float,
    ) -> None:
        """Queue a copy of an answered request, or count the reason why it is not copied."""
        counts = self._counter.of(endpoint, shadow.key)
        counts.offered += 1
        if shadow.wake:
            self._wake(shadow.deployment)
        given = sum(map(len, result.reply.data))
        size = asked + given
        reason = self._refusal(endpoint, shadow, max(asked, given), size)
        if reason is not None:
            self._refused(endpoint, counts, reason)
            return
        now = time.monotonic()
        copy = Copy(
            endpoint,
            shadow.deployment,
            request.rows,
            request.key,
            # Copy the bytes. A view would keep the whole body in memory, and a body may be much larger than
            # its tensors.
            [bytes(each) for each in request.data],
            trace[:255],
            min(timeout_ms / 1e3, policy.ANSWER_S),
            lambda _: None,
        )
        reply = result.reply
        # The bytes are copied, because a view would keep the whole message in memory, with the answers to
        # other requests.
        outputs = [
            Output(tensor, reply.rows, bytes(raw))
            for tensor, raw in zip(result.outputs, reply.data, strict=True)
        ]
        pair = _Pair(
            shadow, counts, endpoint, telemetry.shown_id(trace), outputs, size, seconds,
            reply.compute_us / 1e6, copy, now,
        )  # fmt: skip
        copy.done = partial(self._on_answer, pair)
        self._waiting.setdefault(shadow.deployment.name, deque()).append(pair)
        self._send_soon()

    def _refusal(self, endpoint: str, shadow: ShadowRoute, largest: int, size: int) -> str | None:
        route = shadow.deployment
        if policy.is_unfit(route):
            return policy.UNFIT
        if not self._within_rate(endpoint, shadow):
            return policy.OVER_RATE
        if largest > self._largest:
            return policy.TOO_LARGE
        if not self._publisher.connected:
            return policy.NO_BROKER
        if not self._fleet(route.name).ready:
            return policy.NO_REPLICA
        if len(self._waiting.get(route.name, ())) >= policy.WAITING:
            return policy.NO_IDLE_REPLICA
        return None if self._memory.take(size) else policy.NO_MEMORY

    def _within_rate(self, endpoint: str, shadow: ShadowRoute) -> bool:
        if shadow.max_per_s is None:
            return True
        rate, bucket = self._buckets.get(endpoint, (0.0, None))
        if bucket is None or rate != shadow.max_per_s:
            bucket = TokenBucket(shadow.max_per_s, max(1.0, shadow.max_per_s / 10))
            self._buckets[endpoint] = (shadow.max_per_s, bucket)
        return bucket.take(time.monotonic())

    def _send_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(COLLECT_S, self._send)

    def _send(self) -> None:
        """Send copies to the Deployments that have idle replicas."""
        self._due = False
        for name, waiting in self._waiting.items():
            if not waiting:
                continue
            fleet = self._fleet(name)
            room = policy.spare(fleet, self._outstanding(name), self._gateways())
            free = min(room - self._publisher.in_flight(name), len(waiting))
            if free <= 0 or policy.is_host_busy(fleet, self._host_busy):
                continue
            pairs, now = [waiting.popleft() for _ in range(free)], time.perf_counter()
            for pair in pairs:
                pair.sent = now
                pair.counts.copied += 1
            self._publisher.publish([pair.copy for pair in pairs], fleet)

    def _on_answer(self, pair: _Pair, outcome: Reply | tuple[str, str]) -> None:
        """Count the outcome of a copy. Keep the answer only if it will be compared."""
        seconds = time.perf_counter() - pair.sent
        if not isinstance(outcome, Reply):
            self._failed(pair, *outcome)
        elif outcome.status == envelope.FAILED:
            self._failed(pair, *_failure(outcome))
        else:
            self._on_reply(pair, outcome, seconds)
        if self._waiting.get(pair.shadow.deployment.name):
            self._send_soon()

    def _on_reply(self, pair: _Pair, reply: Reply, seconds: float) -> None:
        try:
            tensors, _ = envelope.read_result_key(reply.key)
            pair.answer = [
                Output(tensor, reply.rows, bytes(raw))
                for tensor, raw in zip(tensors, reply.data, strict=True)
            ]
        except ValueError as error:
            self._failed(pair, "unreadable", str(error))
            return
        answer(pair.counts, pair.seconds, seconds, pair.call_s, reply.compute_us / 1e6)
        self._count(pair.endpoint, "answered")
        if self._compare_bucket.take(time.monotonic()):
            self._answered.append(pair)
        else:
            self._memory.release(pair.size)

    def _failed(self, pair: _Pair, reason: str, message: str) -> None:
        fail(pair.counts, reason, message)
        self._count(pair.endpoint, "failed")
        self._memory.release(pair.size)

    def _refused(self, endpoint: str, counts: ShadowCounts, reason: str) -> None:
        refuse(counts, reason)
        self._count(endpoint, reason)

    # --- rounds --------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(ROUND_S)
            try:
                await self._round()
            except Exception:  # later rounds must still run
                log.exception("a round of shadow traffic failed")

    async def _round(self) -> None:
        self._publisher.expire()
        self._drop_late()
        self._send()
        pairs = self._take_answered()
        if not pairs:
            return
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, _compare_all, pairs)
        finally:
            for pair in pairs:
                self._memory.release(pair.size)
        now = time.time()
        for pair, comparisons in zip(pairs, found, strict=True):
            if comparisons is None:
                fail(pair.counts, "not comparable")
            else:
                compared(pair.counts, pair.request, comparisons, now)

    def _take_answered(self) -> list[_Pair]:
        """Remove and return the answers that are compared in this round.

        The number of bytes per second is limited, so that comparisons do not use too much CPU time.
        """
        pairs, size = [], 0
        while self._answered and size < policy.COMPARED_BYTES_PER_S * ROUND_S:
            pair = self._answered.popleft()
            pairs.append(pair)
            size += pair.size
        return pairs

    def _drop_late(self) -> None:
        """Drop the copies that found no idle replica in time."""
        late = time.monotonic() - policy.WAIT_S
        for name in list(self._waiting):
            waiting = self._waiting[name]
            busy = policy.is_host_busy(self._fleet(name), self._host_busy)
            while waiting and waiting[0].since <= late:
                pair = waiting.popleft()
                self._memory.release(pair.size)
                reason = policy.BUSY_HOST if busy else policy.NO_IDLE_REPLICA
                self._refused(pair.endpoint, pair.counts, reason)
            if not waiting:
                del self._waiting[name]


def _failure(reply: Reply) -> tuple[str, str]:
    """Return the reason and the message of a failed reply."""
    body = orjson.loads(reply.key)
    return body["reason"], body["message"]


def _compare_all(pairs: Sequence[_Pair]) -> list[list[Comparison] | None]:
    """Compare the answers of each pair. The result is None for a pair that cannot be compared.

    This function runs in a thread. Its short pauses release Python's global lock, so the event loop can run.
    """
    found: list[list[Comparison] | None] = []
    for pair in pairs:
        try:
            shadow = pair.shadow
            found.append(
                compare(pair.outputs, pair.answer or [], shadow.atol, shadow.rtol, lambda: time.sleep(0))
            )
        except Exception:  # a malformed tensor must not stop the other comparisons
            log.exception("two answers could not be compared")
            found.append(None)
    return found
