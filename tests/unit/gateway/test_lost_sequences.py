"""A lost request of a sequence: which other requests fail with it, and which are sent again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.gateway.test_sequences import Gateway, settled, started
from tidegate.kernel.errors import SequenceLost

pytestmark = pytest.mark.unit


async def test_a_lost_start_is_not_sent_again_without_the_requests_that_followed_it():
    """The next request would continue a state that lacks one."""
    gateway = Gateway("a", "b")
    for name in ("start", "second"):
        gateway.ask(name, start=name == "start")
        await settled()
    gateway.ask("other", 2, start=True)
    await settled()
    await gateway.answer("start", SequenceLost("the replica has ended"))
    assert [name for name, _, _ in gateway.sent] == ["start", "second", "other"]
    assert [name for name, _ in gateway.outcomes] == ["second", "start"]
    gateway.ask("third")
    await settled()
    assert [type(outcome) for _, outcome in gateway.outcomes] == [SequenceLost] * 3
    assert gateway.outcomes[-1][0] == "third"
    await gateway.answer("other")
    assert gateway.outcomes[-1] == ("other", "an answer")


async def test_a_lost_second_request_is_known_before_the_start_is_lost():
    """The worker refuses waiting requests at once, and the running one when its call has failed."""
    gateway = Gateway("a", "b")
    gateway.ask("start", start=True)
    await settled()
    gateway.ask("second")
    await settled()
    await gateway.answer("second", SequenceLost("the model server has ended"))
    assert [name for name, _ in gateway.outcomes] == ["second"]
    await gateway.answer("start", SequenceLost("the model server has ended"))
    assert [name for name, _, _ in gateway.sent] == ["start", "second"]
    assert gateway.outcomes[-1][0] == "start"


async def test_a_start_that_is_lost_during_its_upload_is_sent_again():
    gateway = Gateway("a", "b")
    gateway.uploading.add((1).to_bytes(16, "little"))
    gateway.ask("start", start=True)
    await settled()
    await gateway.answer("start", SequenceLost("the replica has ended"))
    gateway.uploading.clear()
    while len(gateway.sent) < 2:
        await asyncio.sleep(0.005)
    assert [name for name, _, _ in gateway.sent] == ["start", "start"]
    await gateway.answer("start")
    assert gateway.outcomes == [("start", "an answer")]


async def test_a_request_that_was_accepted_in_the_same_moment_counts():
    gateway = Gateway("a", "b")
    gateway.ask("start", start=True)
    await settled()
    gateway.ask("second")
    await gateway.answer("start", SequenceLost("the replica has ended"))
    assert all(isinstance(outcome, SequenceLost) for _, outcome in gateway.outcomes)
    assert sorted(name for name, _ in gateway.outcomes) == ["second", "start"]


async def test_a_lost_start_is_not_sent_again_over_a_newer_start():
    gateway = Gateway("a", "b")
    for name in ("first", "second"):
        gateway.ask(name, start=True)
        await settled()
    await gateway.answer("first", SequenceLost("the replica has ended"))
    assert [name for name, _, _ in gateway.sent] == ["first", "second"]
    await gateway.answer("second")
    assert [(name, type(outcome)) for name, outcome in gateway.outcomes] == [
        ("first", SequenceLost),
        ("second", str),
    ]


@pytest.mark.parametrize("step", ["find", "keep", "declare"])
async def test_a_loss_while_a_later_request_asks_for_its_place(step: str, monkeypatch):
    gateway = await started("a")
    gateway.ask("second")
    await settled()
    goes_on, owner = asyncio.Event(), gateway if step == "declare" else gateway.places
    original = getattr(owner, step)

    async def slow(*arguments: Any) -> Any:
        found = await original(*arguments)
        await goes_on.wait()
        return found

    monkeypatch.setattr(owner, step, slow)
    gateway.ask("third")
    await settled()
    await gateway.answer("second", SequenceLost("it is not known if it ran"))
    goes_on.set()
    await settled()
    assert [name for name, _, _ in gateway.sent] == ["start", "second"]
    assert [(name, type(outcome)) for name, outcome in gateway.outcomes[1:]] == [
        ("second", SequenceLost),
        ("third", SequenceLost),
    ]
    gateway.ask("again", start=True)
    await settled()
    assert gateway.sent[-1][0] == "again"


async def test_an_earlier_request_of_a_lost_sequence_keeps_its_answer():
    gateway = Gateway("a")
    gateway.ask("start", start=True)
    await settled()
    for name in ("second", "third"):
        gateway.ask(name)
        await settled()
    await gateway.answer("second", SequenceLost("it is not known if it ran"))
    await gateway.answer("start")
    outcomes = {name: type(outcome) for name, outcome in gateway.outcomes}
    assert outcomes == {"second": SequenceLost, "third": SequenceLost, "start": str}
    assert gateway.router._remembered == {}, "the store knows that it is lost"


async def test_a_lost_request_fails_the_later_ones_of_its_sequence():
    """The broker's connection was lost, so the first may not have run. The second must not run without it."""
    gateway = await started("a")
    for number in range(300):
        gateway.ask(f"next {number}")
    await settled()
    while len(gateway.sent) < 301:
        await asyncio.sleep(0.005)
    await gateway.answer("next 0", SequenceLost("it is not known if it ran"))
    assert len(gateway.outcomes) == 301
    assert all(isinstance(outcome, SequenceLost) for _, outcome in gateway.outcomes[1:])


async def test_a_request_that_comes_before_the_loss_is_recorded(monkeypatch):
    gateway = await started("a")
    recorded = asyncio.Event()

    async def end(*_: Any, **__: Any) -> None:
        await recorded.wait()

    monkeypatch.setattr(gateway.places, "end", end)
    gateway.ask("next")
    await settled()
    await gateway.answer("next", SequenceLost("it is not known if it ran"))
    gateway.ask("early")
    await settled()
    assert [(name, type(outcome)) for name, outcome in gateway.outcomes[1:]] == [
        ("next", SequenceLost),
        ("early", SequenceLost),
    ]
    gateway.ask("again", start=True)
    await settled()
    assert gateway.sent[-1][0] == "again"
    recorded.set()
