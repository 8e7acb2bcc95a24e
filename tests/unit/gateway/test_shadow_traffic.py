"""Copies for shadow traffic: when there is one, when there is none and why, and what becomes of it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from services.gateway.adapters.copy_publisher import CopyPublisher
from services.gateway.application.inference.core import InferenceResult, Timing
from services.gateway.application.inference.shadow_traffic import ShadowTraffic
from services.gateway.domain import shadow_policy as policy
from services.gateway.domain.contract import Decoded
from services.gateway.domain.replica_fleet import ReplicaFleet
from tests.conftest import PATIENCE_S
from tests.unit.gateway.test_routing import table
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, tensor
from tidegate.kernel.protocol.shadow import ShadowCounts
from tidegate.kernel.protocol.tenant import caller_of, endpoint_of

pytestmark = pytest.mark.unit

SHADOW = {
    "deployment": "digits-v2", "key": "s1", "rate": 100.0, "max_per_s": None, "atol": 1e-6, "rtol": 1e-4,
    "wake": False, "until": None,
}  # fmt: skip
Y = (tensor("y", "FP32", (2,)),)


class Broker:
    """The dispatcher's connection: it keeps the requests of each message, and answers them on demand."""

    def __init__(self) -> None:
        self.messages: list[list[envelope.Request]] = []
        self.blocked = False
        self.out = SimpleNamespace(channel=self)
        self.reply_to = "replies"
        self.on_other_reply: Any = None

    def send(self, body: Any, *, routing_key: str, mandatory: bool, **_: Any) -> None:
        assert (routing_key, mandatory) == ("requests.v1.digits-v2", True)
        whole = body if isinstance(body, bytes) else b"".join(body)
        frames = envelope.unpack(envelope.REQUESTS, whole)
        self.messages.append([envelope.read_request(frame) for frame in frames])

    @property
    def copies(self) -> list[envelope.Request]:
        return [request for message in self.messages for request in message]

    def answer(self, copy: envelope.Request, *values: float) -> None:
        raw = np.array(values, "<f4").tobytes()
        reply = Reply(copy.id, envelope.OK, 0, 0, 1, 0, 2000, 1, envelope.result_key(Y), [raw])
        self.on_other_reply(reply)

    def fail(self, copy: envelope.Request) -> None:
        self.on_other_reply(envelope.read_reply(envelope.failure_frame(copy.id, 0, "model_failed", "broken")))


class Rig:
    """Shadow traffic without a broker and without replicas."""

    def __init__(self, **shadow: Any) -> None:
        self.broker = Broker()
        self.fleet = ReplicaFleet(ready=1, parallel=8.0, request_ms=0.1)
        self.outstanding = 0
        self.woken: list[str] = []
        self.metrics: list[tuple[str, str]] = []
        self.table = table([1, 0], shadow={**SHADOW, **shadow})
        self.traffic = ShadowTraffic(
            CopyPublisher(self.broker, b"12345678"),  # type: ignore[arg-type]
            fleet=lambda _: self.fleet,
            outstanding=lambda _: self.outstanding,
            gateways=lambda: 1,
            wake=lambda route: self.woken.append(route.name),
            table=lambda: self.table,
            count=lambda *outcome: self.metrics.append(outcome),
            largest=2**20,
            host_busy=0.9,
        )

    @property
    def counts(self) -> ShadowCounts:
        return self.traffic.report().get("digits", ShadowCounts())

    def ask(self, *, size: int = 8, error: ModelFailed | None = None) -> list[Any]:
        """Answer a request with 1 and 2, and return what its caller got."""
        endpoint = self.table.endpoints["digits"]
        request = Decoded("", 1, b"key", [bytes(size)], None, False)
        seen: list[Any] = []
        done = self.traffic.watch(endpoint, endpoint.targets[0], request, b"r1", 1000.0, seen.append)
        raw = np.array([1.0, 2.0], "<f4").tobytes()
        reply = Reply(b"1" * 16, envelope.OK, 0, 0, 1, 0, 1000, 1, b"", [raw])
        result = InferenceResult(endpoint.targets[0], request, 1, Y, {}, reply, Timing())
        done(error or result)
        return seen

    async def copies(self, count: int) -> list[envelope.Request]:
        """Wait until this many copies were sent."""
        end = time.monotonic() + PATIENCE_S
        while len(self.broker.copies) < count:
            assert time.monotonic() < end, self.counts
            await asyncio.sleep(0.002)
        return self.broker.copies

    async def round(self) -> None:
        await self.traffic._round()


async def test_a_copy_is_sent_after_the_answer_and_compared():
    rig = Rig()
    assert len(rig.ask()) == 1
    assert not rig.broker.copies, "the answer leaves first"
    (copy,) = await rig.copies(1)
    assert (copy.flags, copy.key, copy.rows, copy.trace) == (
        envelope.COPY | envelope.RETRY_SAFE,
        b"key",
        1,
        b"r1",
    )
    assert (caller_of(copy.tenant), endpoint_of(copy.tenant)) == ("(shadow)", "digits"), "nobody is billed"
    rig.broker.answer(copy, 1.0, 3.0)
    await rig.round()
    counts = rig.counts
    assert (counts.offered, counts.copied, counts.answered, counts.compared, counts.agreed) == (1, 1, 1, 1, 0)
    assert counts.outputs["y"].max_abs == 1.0
    assert [(each.request, each.output) for each in counts.differing] == [("r1", "y")]
    assert (sum(counts.primary), sum(counts.shadow_call)) == (1, 1)
    assert rig.metrics == [("digits", "answered")]
    assert rig.traffic._memory.used == 0


async def test_failures_of_the_shadow_are_counted_and_nobody_sees_them():
    rig = Rig()
    seen = rig.ask()
    (copy,) = await rig.copies(1)
    rig.broker.fail(copy)
    rig.broker.answer(copy, 1.0, 2.0)  # a second reply to the same copy is ignored
    assert (rig.counts.failed, rig.counts.answered, rig.counts.last_failure) == (
        {"model_failed": 1},
        0,
        "broken",
    )
    assert len(seen) == 1
    assert rig.traffic._memory.used == 0


async def test_a_request_that_failed_is_not_copied():
    rig = Rig()
    rig.ask(error=ModelFailed("no"))
    assert rig.counts.offered == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fleet": ReplicaFleet(ready=0)}, policy.NO_REPLICA),
        ({"size": 2**20 + 1}, policy.TOO_LARGE),
        ({"blocked": True}, policy.NO_BROKER),
    ],
)
async def test_why_there_is_no_copy(change, reason):
    rig = Rig()
    rig.fleet = change.get("fleet", rig.fleet)
    rig.broker.blocked = change.get("blocked", False)
    rig.ask(size=change.get("size", 8))
    assert (rig.counts.refused, rig.counts.copied) == ({reason: 1}, 0)
    assert rig.metrics == [("digits", reason)]
    assert rig.woken == []


async def test_copies_wait_for_an_idle_replica_and_are_dropped_late(monkeypatch: pytest.MonkeyPatch):
    rig = Rig()
    rig.outstanding = 1  # the only replica runs a request
    rig.ask()
    await rig.round()
    assert (rig.broker.copies, rig.counts.refused) == ([], {})
    rig.outstanding = 0
    await rig.round()
    assert len(rig.broker.copies) == 1
    rig.outstanding = 1
    rig.ask()
    monkeypatch.setattr(policy, "WAIT_S", 0.0)
    await rig.round()
    assert (rig.counts.refused, len(rig.broker.copies)) == ({policy.NO_IDLE_REPLICA: 1}, 1)


async def test_no_copy_goes_to_a_busy_host(monkeypatch: pytest.MonkeyPatch):
    rig = Rig()
    rig.fleet = ReplicaFleet(ready=1, host_busy=0.95)
    rig.ask()
    await rig.round()
    assert (rig.broker.copies, rig.counts.refused) == ([], {})
    monkeypatch.setattr(policy, "WAIT_S", 0.0)
    await rig.round()
    assert (rig.broker.copies, rig.counts.refused) == ([], {policy.BUSY_HOST: 1})
    rig.fleet = ReplicaFleet(ready=1, host_busy=0.85)
    rig.ask()
    await rig.copies(1)


async def test_copies_in_flight_and_waiting_are_limited():
    rig = Rig()
    for _ in range(policy.WAITING + 20):
        rig.ask()
    assert rig.counts.refused == {policy.NO_IDLE_REPLICA: 20}
    copies = await rig.copies(8)
    await rig.round()
    assert len(rig.broker.copies) == 8, "as many as the replica takes at the same time"
    rig.broker.answer(copies[0], 1.0, 2.0)
    await rig.copies(9)


async def test_copies_share_a_message():
    rig = Rig()
    for _ in range(4):
        rig.ask()
    await rig.copies(4)
    assert [len(message) for message in rig.broker.messages] == [4]


async def test_the_rates():
    rig = Rig(rate=25.0, max_per_s=100.0)
    for _ in range(2000):
        rig.ask()
    assert 350 < rig.counts.offered < 650
    assert rig.counts.refused[policy.OVER_RATE] > 300


async def test_a_shadow_whose_time_is_over_gets_no_copy():
    rig = Rig(until=time.time() - 1)
    rig.ask()
    assert rig.counts.offered == 0


async def test_only_a_shadow_with_wake_requests_a_replica():
    rig = Rig(wake=True)
    rig.fleet = ReplicaFleet(ready=0)
    rig.ask()
    assert rig.woken == ["digits-v2"]


async def test_a_copy_without_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch):
    rig = Rig()
    monkeypatch.setattr(policy, "ANSWER_S", 0.0)
    rig.ask()
    await rig.copies(1)
    await rig.round()
    assert rig.counts.failed == {policy.NO_ANSWER: 1}
    assert rig.traffic._publisher.in_flight("digits-v2") == 0


async def test_counts_end_with_the_shadow():
    rig = Rig()
    rig.ask()
    assert rig.counts.offered == 1
    rig.table = table([1, 0])
    assert rig.traffic.report() == {}


@pytest.mark.parametrize(
    ("fleet", "outstanding", "gateways", "room"),
    [
        (ReplicaFleet(ready=0), 0, 1, 0),
        (ReplicaFleet(ready=1, parallel=4.0), 0, 1, 4),
        (ReplicaFleet(ready=3, parallel=4.0), 1, 1, 8),
        (ReplicaFleet(ready=3, parallel=4.0, elsewhere=2), 1, 1, 0),
        (ReplicaFleet(ready=2, parallel=4.0), 0, 4, 2),
        (ReplicaFleet(ready=1, parallel=1.0), 0, 4, 1),
    ],
)
def test_only_idle_replicas_have_room(fleet, outstanding, gateways, room):
    assert policy.spare(fleet, outstanding, gateways) == room


async def test_a_waiting_copy_keeps_only_the_tensors_of_its_request():
    """A body may be much larger than its tensors, and no limit counts it any more."""
    rig = Rig()
    endpoint, body = rig.table.endpoints["digits"], bytearray(1000)
    request = Decoded("", 1, b"key", [memoryview(body)[:8]], None, False)
    done = rig.traffic.watch(endpoint, endpoint.targets[0], request, b"r1", 1000.0, lambda _: None)
    reply = Reply(b"1" * 16, envelope.OK, 0, 0, 1, 0, 1000, 1, b"", [bytes(8)])
    done(InferenceResult(endpoint.targets[0], request._replace(data=[]), 1, Y, {}, reply, Timing()))
    del request, done
    body.clear()  # it raises BufferError while there is a view
    assert [bytes(copy.data[0]) for copy in await rig.copies(1)] == [bytes(8)]
