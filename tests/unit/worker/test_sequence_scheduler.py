"""The requests of sequences in a worker, without broker and model server: order, ends, and losses."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pytest

from services.worker.application.sequence_scheduler import SequenceScheduler
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed, SequenceLost, TidegateError
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.models import SequenceSpec
from tidegate.kernel.protocol.sequences import START_FLAG
from tidegate.kernel.protocol.tenant import tenant_of

pytestmark = pytest.mark.unit


class Calls:
    """A model whose calls end when the test says so."""

    def __init__(self) -> None:
        self.serving = True
        self.running: dict[str, asyncio.Event] = {}
        self.begun: list[tuple[str, Any]] = []
        self.refused: list[tuple[str, TidegateError]] = []
        self.errors: dict[str, TidegateError] = {}

    def call_in_sequence(self, item: QueuedRequest) -> asyncio.Task[None]:
        name = item.request.trace.decode()
        self.begun.append((name, envelope.read_call_key(item.request.key).parameters["sequence_id"]))
        ended = self.running[name] = asyncio.Event()

        async def run() -> None:
            await ended.wait()
            assert item.sequence is not None
            item.sequence.error = self.errors.get(name)

        return asyncio.create_task(run())

    async def refuse(self, item: QueuedRequest, error: TidegateError) -> None:
        self.refused.append((item.request.trace.decode(), error))

    async def end(self, name: str) -> None:
        self.running.pop(name).set()
        await settled()


async def settled() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def item(
    name: str, id_: int | str = 1, *, caller: str = "k", start: bool = False, end: bool = False,
    lives_s: float = 600.0, flags: int = 0,
) -> QueuedRequest:  # fmt: skip
    parameters = {"sequence_id": id_, "sequence_start": start, "sequence_end": end}
    frame = envelope.request_frame(
        os.urandom(16), int((time.time() + lives_s) * 1e3), 1, envelope.call_key((), (), parameters), [],
        tenant=tenant_of(caller, "sums"), trace=name.encode(), flags=flags,
    )  # fmt: skip
    return QueuedRequest(envelope.read_request(frame), UnackedDelivery(None, 1, "", 1), time.monotonic())


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
async def scheduler(calls: Calls):
    found = SequenceScheduler(SequenceSpec(slots=4, idle_ms=20.0), 2, calls)
    yield found
    await found.stop()


async def test_one_request_of_a_sequence_at_a_time(calls: Calls, scheduler: SequenceScheduler):
    assert scheduler.slots == 8
    for name in "abc":
        scheduler.add(item(name, start=name == "a", end=name == "c"))
    scheduler.add(item("x", 2, start=True))
    await settled()
    assert [name for name, _ in calls.begun] == ["a", "x"]
    assert (scheduler.kept, scheduler.waiting) == (2, 2)
    await calls.end("a")
    await calls.end("b")
    await calls.end("c")
    assert [name for name, _ in calls.begun] == ["a", "x", "b", "c"]
    assert scheduler.kept == 1, "the end frees the slot"


async def test_an_idle_sequence_ends(calls: Calls, scheduler: SequenceScheduler):
    scheduler.add(item("a", start=True))
    await settled()
    await calls.end("a")
    assert scheduler.kept == 1
    while scheduler.kept:
        await asyncio.sleep(0.01)
    scheduler.add(item("late"))
    await settled()
    ((name, error),) = calls.refused
    assert name == "late"
    assert isinstance(error, BadRequest)
    assert error.message == (
        "inference request for sequence 1 to model 'sums' must specify the START flag on the first request "
        "of the sequence"
    )


async def test_two_callers_with_the_same_id(calls: Calls, scheduler: SequenceScheduler):
    scheduler.add(item("a", 7, start=True, caller="one"))
    scheduler.add(item("b", 7, start=True, caller="two"))
    scheduler.add(item("s", "7", start=True, caller="two"))
    scheduler.add(item("t", "7", start=True, caller="one"))
    await settled()
    ids = dict(calls.begun)
    assert (ids["a"], ids["s"]) == (7, "7"), "the model sees the caller's id"
    assert ids["b"] != 7
    assert ids["t"] != "7"
    await calls.end("b")
    scheduler.add(item("c", 7, caller="two"))
    await settled()
    assert dict(calls.begun)["c"] == ids["b"]


async def test_a_start_after_the_end_begins_again(calls: Calls, scheduler: SequenceScheduler):
    for name in "abcd":
        scheduler.add(item(name, start=name in "ac", end=name == "b"))
    for name in "abcd":
        await settled()
        await calls.end(name)
    assert [name for name, _ in calls.begun] == list("abcd")
    assert scheduler.kept == 1
    assert calls.refused == []


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (BadRequest(f"... {START_FLAG} ..."), 0),
        (BadRequest("batch size 3"), 1),
        (ModelFailed("KeyError"), 1),
    ],
)
async def test_a_failed_request(calls: Calls, scheduler: SequenceScheduler, error: TidegateError, kept: int):
    scheduler.add(item("a", start=True))
    await settled()
    await calls.end("a")
    calls.errors["b"] = error
    scheduler.add(item("b", end=True))
    await settled()
    await calls.end("b")
    assert scheduler.kept == kept


async def test_a_refused_start_takes_no_slot(calls: Calls, scheduler: SequenceScheduler):
    calls.errors["a"] = BadRequest("input 'x': wrong shape")
    scheduler.add(item("a", start=True))
    await settled()
    await calls.end("a")
    assert scheduler.kept == 0


async def test_a_lost_model_server_loses_all_sequences(calls: Calls, scheduler: SequenceScheduler):
    scheduler.add(item("a", start=True))
    scheduler.add(item("b"))
    await settled()
    calls.serving = False
    scheduler.lose()
    await settled()
    scheduler.add(item("c"))
    scheduler.add(item("unknown", 99))
    scheduler.add(item("new", start=True))
    await settled()
    assert scheduler.kept == 1
    assert [(name, type(error)) for name, error in calls.refused] == [
        ("b", SequenceLost),
        ("c", SequenceLost),
        ("unknown", BadRequest),
    ]
    assert all(START_FLAG in error.message for _, error in calls.refused)
    assert [name for name, _ in calls.begun] == ["a"], "a new one waits for the model"
    calls.serving = True
    scheduler.serve()
    await settled()
    assert [name for name, _ in calls.begun] == ["a", "new"]
    await calls.end("a")
    assert scheduler.kept == 1, "the end of the lost call changes nothing"


async def test_what_is_delivered_again(calls: Calls, scheduler: SequenceScheduler):
    first, second, third = item("a", start=True), item("b"), item("c")
    for each in (first, second, third):
        scheduler.add(each)
    await settled()
    await calls.end("a")
    scheduler.discard_waiting()  # the connection was lost; b is in the model
    for each in (first, second, third):
        again = QueuedRequest(each.request, UnackedDelivery(None, 9, "", 1), time.monotonic())
        scheduler.add(again, again=True)
    await settled()
    assert [(name, type(error)) for name, error in calls.refused] == [("a", SequenceLost)]
    assert second.delivery.tag == 9, "the reply settles the second delivery"
    await calls.end("b")
    assert [name for name, _ in calls.begun] == ["a", "b", "c"], "c had not begun"


async def test_a_request_that_waits_for_a_model_does_not_run_twice(
    calls: Calls, scheduler: SequenceScheduler
):
    calls.serving = False
    first = item("a", start=True)
    scheduler.add(first)
    await settled()
    scheduler.discard_waiting()  # the connection was lost
    again = QueuedRequest(first.request, UnackedDelivery(None, 9, "", 1), time.monotonic())
    scheduler.add(again, again=True)
    calls.serving = True
    scheduler.serve()
    await settled()
    await calls.end("a")
    await settled()
    assert [name for name, _ in calls.begun] == ["a"]
    assert first.delivery.tag == 9
    assert calls.refused == []


async def test_a_request_whose_deadline_passes_without_a_model_is_answered(
    calls: Calls, scheduler: SequenceScheduler
):
    calls.serving = False
    scheduler.add(item("a", start=True, lives_s=0.01))
    while not calls.refused:
        await asyncio.sleep(0.005)
    ((name, error),) = calls.refused
    assert (name, type(error)) == ("a", DeadlinePassed), "its message must be settled"


async def test_a_request_that_fetches_its_tensors_while_the_model_server_ends(
    calls: Calls, scheduler: SequenceScheduler
):
    fetched = asyncio.Event()

    async def fetch(_: QueuedRequest) -> bool:
        return await fetched.wait()

    scheduler.fetch = fetch
    scheduler.add(item("a", start=True))
    await settled()
    await calls.end("a")
    scheduler.add(item("large", flags=envelope.CLAIM))
    await settled()
    scheduler.lose()
    fetched.set()
    await settled()
    assert [(name, type(error)) for name, error in calls.refused] == [("large", SequenceLost)]
    assert [name for name, _ in calls.begun] == ["a"]
