"""The requests of sequences in a gateway, without broker, store and workers: order, places, losses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.application.inference import sequences as module
from services.gateway.application.inference.sequences import SequenceRouter
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import EndpointRoute, parse_table
from services.gateway.domain.sequences import Place, SequenceSlots, key_of
from tidegate.kernel.errors import BadRequest, Overloaded, SequenceLost, TidegateError, Unavailable
from tidegate.kernel.protocol.presence import GatewayLoad
from tidegate.kernel.protocol.sequences import SequenceMark
from tidegate.kernel.store import StoreUnavailable

pytestmark = pytest.mark.unit

TENSOR = {"name": "x", "datatype": "INT32", "shape": [1]}


def endpoint() -> EndpointRoute:
    def deployment(version: int) -> dict[str, Any]:
        return {
            "model": "sums", "version": version, "format": "triton", "max_queue": 10, "retry": "safe",
            "wakeable": True, "ready": 2,
            "signature": {
                "inputs": [TENSOR], "outputs": [TENSOR], "max_batch_size": 8,
                "sequences": {"slots": 2, "idle_ms": 1000.0},
            },
        }  # fmt: skip

    one = {
        "targets": [{"deployment": "sums-v2", "weight": 1}], "versions": {"1": "sums-v1", "2": "sums-v2"},
        "default_timeout_ms": 1000,
    }  # fmt: skip
    deployments = {"sums-v1": deployment(1), "sums-v2": deployment(2)}
    table = {"epoch": "1", "n": 1, "endpoints": {"sums": one}, "deployments": deployments}
    return parse_table(table).endpoints["sums"]


class Places:
    """The places of sequences in memory. ``away``: the store does not answer."""

    def __init__(self) -> None:
        self.found: dict[str, Place] = {}
        self.away = False

    async def find(self, key: str) -> Place | None:
        self._answer()
        return self.found.get(key)

    async def start(self, key: str, name: str, ready: list[SequenceSlots], token: str, *_: Any) -> Place:
        self._answer()
        self.found[key] = Place(name, ready[-1].name, token)
        return self.found[key]

    async def keep(self, key: str, place: Place, *_: Any) -> bool:
        self._answer()
        return self.found.get(key) == place

    async def end(self, key: str, place: Place, *, lost: bool = False) -> bool:
        self._answer()
        if self.found.get(key) != place:
            return False
        del self.found[key]
        if lost:
            self.found[key] = place._replace(lost=True)
        return True

    def _answer(self) -> None:
        if self.away:
            raise StoreUnavailable("The store does not answer.")


class Gateway:
    """A router whose requests are kept. ``replicas`` are ready."""

    def __init__(self, *replicas: str, slots: int = 2) -> None:
        self.endpoint = endpoint()
        self.replicas = tuple(SequenceSlots(name, slots) for name in replicas)
        self.sent: list[tuple[str, str, str]] = []
        self.done: dict[bytes, Any] = {}
        self.outcomes: list[tuple[str, Any]] = []
        self.uploading = set[bytes]()
        self.ids: dict[bytes, str] = {}
        self.count = 0
        self.ended = True
        self.broken = False
        self.places = Places()
        self.router = SequenceRouter(
            cast(Any, self),
            cast(Any, self),
            lambda _: ReplicaFleet(sequences=self.replicas),
            cast(Any, self.places),
        )
        self.router._watch = cast(Any, self)
        self.load = GatewayLoad()

    # --- the dispatcher, the watch of replicas, and the core -------------------------------------------

    def new_id(self) -> bytes:
        self.count += 1
        return self.count.to_bytes(16, "little")

    def queue_of(self, _: Any) -> Any:
        return SimpleNamespace(load=self.load)

    def demand(self, _: Any) -> None:
        """Start no replica."""

    def uploads(self, id_: bytes) -> bool:
        return id_ in self.uploading

    async def declare(self, _: Any) -> None:
        """Have all queues."""

    async def has_ended(self, _: Any) -> bool:
        await asyncio.sleep(0)
        return self.ended

    def begin(self, *_: Any) -> None:
        """Watch nothing."""

    def end(self, *_: Any) -> None:
        """Watch nothing."""

    def fail(self, id_: bytes, error: TidegateError) -> None:
        self.done.pop(id_)(error)

    def send(
        self, _: Any, route: Any, request: Decoded, *rest: Any, id_: bytes = b"", keeper: str = ""
    ) -> bytes:
        if self.broken:
            raise Unavailable("it cannot be sent")
        self.sent.append((request.id, route.name, keeper))
        self.done[id_], self.ids[id_] = rest[3], request.id
        return id_

    async def stream_from(
        self, route: Any, request: Decoded, *rest: Any, id_: bytes, keeper: str, **_: Any
    ) -> AsyncGenerator[str]:
        self.sent.append((request.id, route.name, keeper))
        rest[3]()  # it is queued
        yield request.id

    # --- for tests -------------------------------------------------------------------------------------

    def ask(self, name: str, id_: int = 1, *, start: bool = False, end: bool = False, deployment: int = 1):
        route = self.endpoint.targets[0] if deployment == 1 else self.endpoint.versions["1"]
        request = Decoded(name, 1, b"", [], None, False, sequence=SequenceMark(id_, start, end))

        def decode(_: Contract) -> Decoded:
            return request

        return self.router.begin(
            self.endpoint, "", route, request, decode, 60_000.0, FlowKey("sums", "caller"), b"", 0.0,
            lambda outcome: self.outcomes.append((name, outcome)),
        )  # fmt: skip

    def stream(self, name: str, *, start: bool = False) -> Any:
        request = Decoded(name, 1, b"", [], None, False, sequence=SequenceMark(1, start, False))
        return self.router.stream(
            self.endpoint, "", self.endpoint.targets[0], request, lambda _: request, 60_000.0,
            FlowKey("sums", "caller"), b"", 0.0, lambda: None,
        )  # fmt: skip

    def nothing_is_open(self) -> bool:
        found = self.router._open
        return not (found._by_id or found._by_key or found._starts)

    async def answer(self, name: str, outcome: Any = "an answer") -> None:
        id_ = next(id_ for id_, known in self.ids.items() if known == name and id_ in self.done)
        self.done.pop(id_)(outcome)
        await settled()


async def settled() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def started(*replicas: str) -> Gateway:
    """A gateway with a sequence, whose first request is answered."""
    gateway = Gateway(*replicas)
    gateway.ask("start", start=True)
    await settled()
    await gateway.answer("start")
    return gateway


async def test_the_order_of_arrival():
    gateway = Gateway("a")
    first = gateway.count + 1
    gateway.uploading.add(first.to_bytes(16, "little"))
    gateway.ask("large", start=True)
    gateway.ask("small")
    gateway.ask("other", 2, start=True)
    await settled()
    assert [name for name, _, _ in gateway.sent] == ["large", "other"]
    gateway.uploading.clear()
    while len(gateway.sent) < 3:
        await asyncio.sleep(0.005)
    assert gateway.sent[-1][0] == "small"


async def test_the_order_of_arrival_at_a_decoupled_model():
    gateway = Gateway("a")
    gateway.uploading.add((1).to_bytes(16, "little"))
    streams = [gateway.stream("large", start=True), gateway.stream("small")]
    tasks = [asyncio.create_task(anext(each)) for each in streams]
    await settled()
    assert [name for name, _, _ in gateway.sent] == ["large"], "its data is uploaded first"
    gateway.uploading.clear()
    while len(gateway.sent) < 2:
        await asyncio.sleep(0.005)
    assert gateway.sent[-1][0] == "small"
    assert await asyncio.gather(*tasks) == ["large", "small"]
    for each in streams:
        await each.aclose()


async def test_a_caller_that_leaves_while_its_first_request_is_sent_again():
    gateway = Gateway("a", "b")
    gateway.ask("start", start=True)
    await settled()
    gateway.uploading.add((2).to_bytes(16, "little"))
    await gateway.answer("start", SequenceLost("the replica has ended"))
    assert [name for name, _, _ in gateway.sent] == ["start", "start"]
    assert list(gateway.router._sending) == [(2).to_bytes(16, "little")]
    gateway.uploading.clear()
    while gateway.router._sending:
        await asyncio.sleep(0.005)


async def test_a_sequence_stays_where_it_began():
    gateway = Gateway("a", "b", "c")
    gateway.ask("start", start=True, deployment=0)
    await settled()
    (_, name, keeper) = gateway.sent[0]
    assert name == "sums-v1"
    gateway.replicas = (SequenceSlots("d", 2),)
    gateway.ask("next")
    await settled()
    assert gateway.sent[1] == ("next", name, keeper), "the traffic goes to version 2 meanwhile"


async def test_what_has_not_started():
    gateway = Gateway("a")
    gateway.ask("early")
    await settled()
    ((_, error),) = gateway.outcomes
    assert isinstance(error, BadRequest)
    assert "must specify the START flag" in error.message
    gateway.ask("start", start=True)
    await settled()
    gateway.ask("end", end=True)
    await settled()
    await gateway.answer("start")
    await gateway.answer("end")
    gateway.ask("late")
    await settled()
    assert isinstance(gateway.outcomes[-1][1], BadRequest), "the sequence has ended"


async def test_a_lost_replica():
    gateway = await started("a")
    gateway.ask("next")
    await settled()
    gateway.router._on_silent(next(iter(gateway.done)))
    await settled()
    assert gateway.outcomes[-1][0] == "next"
    assert isinstance(gateway.outcomes[-1][1], SequenceLost)
    gateway.replicas = (SequenceSlots("a", 2), SequenceSlots("b", 2))
    gateway.ask("again", start=True)
    await settled()
    assert gateway.sent[-1] == ("again", "sums-v2", "b"), "a is reported as ready, but has ended"


async def test_a_replica_that_had_lost_only_its_connection():
    gateway = Gateway("a")
    for id_ in (1, 2):
        gateway.ask(f"start {id_}", id_, start=True)
    await settled()

    async def has_ended(_: Any) -> bool:
        await asyncio.sleep(0)
        return False

    cast(Any, gateway).has_ended = has_ended
    gateway.router._dead["a"] = time.monotonic() + 60
    for id_ in (1, 2):
        gateway.ask(f"next {id_}", id_)
    await settled()
    assert [name for name, _, _ in gateway.sent[2:]] == ["next 1", "next 2"]


async def test_a_lost_start_goes_to_another_replica():
    gateway = Gateway("a")
    gateway.ask("start", start=True)
    await settled()
    gateway.replicas = (SequenceSlots("a", 2), SequenceSlots("b", 2))
    gateway.router._on_silent(next(iter(gateway.done)))
    await settled()
    assert [keeper for _, _, keeper in gateway.sent] == ["a", "b"]
    assert gateway.outcomes == []
    await gateway.answer("start")
    assert gateway.outcomes == [("start", "an answer")]


async def test_a_start_waits_for_a_free_slot(monkeypatch: pytest.MonkeyPatch):
    class Full:
        """A store in which no replica has a free slot."""

        async def find(self, _: str) -> None:
            return None

        async def start(self, *_: Any) -> None:
            return None

    monkeypatch.setattr(module, "WAIT_S", 0.05)
    gateway = Gateway("a", "b")
    gateway.router._places = cast(Any, Full())
    gateway.ask("start", start=True)
    await settled()
    assert gateway.load.outstanding == 1, "the autoscaler sees it"
    while not gateway.outcomes:
        await asyncio.sleep(0.01)
    error = gateway.outcomes[0][1]
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 1.0
    assert "keeps 4 sequences, the limit of the replicas that are ready (2)" in error.message
    assert gateway.load.outstanding == 0


async def test_a_caller_that_has_gone_leaves_nothing_behind():
    gateway = Gateway("a")
    sent = gateway.ask("start", start=True)
    await settled()
    waiting = gateway.ask("next")
    gateway.router.abandon(waiting)
    gateway.router.abandon(sent)
    await settled()
    assert [name for name, _, _ in gateway.sent] == ["start"]
    router = gateway.router
    assert (router._lines, router._sending) == ({}, {})
    assert gateway.nothing_is_open()
    assert gateway.outcomes == []


async def test_two_sequences_of_a_replica_that_had_lost_only_its_connection():
    gateway = Gateway("a")
    for id_ in (1, 2):
        gateway.ask(f"start {id_}", id_, start=True)
    await settled()
    for id_ in (1, 2):
        await gateway.answer(f"start {id_}")
    gateway.router._dead["a"] = float("inf")
    gateway.ended = False
    for id_ in (1, 2):
        gateway.ask(f"next {id_}", id_)
    await settled()
    assert [name for name, _, _ in gateway.sent[2:]] == ["next 1", "next 2"]
    assert len(gateway.outcomes) == 2


async def test_a_request_that_cannot_be_sent_leaves_nothing_behind():
    gateway = Gateway("a")
    gateway.broken = True
    gateway.ask("start", start=True)
    await settled()
    ((_, error),) = gateway.outcomes
    assert isinstance(error, Unavailable)
    assert gateway.router._lines == {}
    assert gateway.nothing_is_open()


async def test_no_sequence_starts_while_the_store_is_away():
    gateway = Gateway("a")
    gateway.places.away = True
    gateway.ask("start", start=True)
    gateway.ask("next", 2)
    await settled()
    assert gateway.sent == []
    (_, start), (_, other) = gateway.outcomes
    for error, words in ((start, "cannot start"), (other, "replica is not known")):
        assert isinstance(error, Unavailable)
        assert (error.reason, error.retry_after_s, words in error.message) == ("store_unavailable", 2.0, True)
    gateway.places.away, gateway.router._away_until = False, 0.0
    gateway.ask("again", start=True)
    await settled()
    assert [name for name, _, _ in gateway.sent] == ["again"]


async def test_a_sequence_that_this_gateway_knows_goes_on_while_the_store_is_away():
    gateway = await started("a")
    gateway.places.away = True
    gateway.ask("next")
    await settled()
    assert gateway.sent[-1] == ("next", "sums-v2", "a")


def test_keys_of_sequences():
    keys = {
        key_of("sums", "", "one", 7), key_of("sums", "", "two", 7), key_of("sums", "", "one", "7"),
        key_of("sums", "2", "one", 7), key_of("other", "", "one", 7),
    }  # fmt: skip
    assert len(keys) == 5
