"""Test on a real SQLite file that the recorder keeps all rounds, and none that follow a gap."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from services.autoscaler.adapters.history.recordings import Recordings
from services.autoscaler.application.recorder import Recorder
from services.autoscaler.domain.recording import decide_again
from services.autoscaler.domain.snapshot import Policy
from tests.conftest import PATIENCE_S
from tests.unit.autoscaler.conftest import World, a_deployment
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.sqlite_file import Database, Row

NAME = "digits-v1"
FOREVER = 1e12


@pytest.fixture
def history(tmp_path: Path) -> Iterator[Recordings]:
    found = Recordings(tmp_path / "history.db", 2**24)
    yield found
    found.close()


def busy(seconds: float) -> World:
    """Return a world with the rounds in which replicas start and end."""
    world = World(a_deployment(max_replicas=9))
    world.call_ms = 20.0
    for number in range(int(seconds // 10)):
        world.outstanding[NAME] = 30 * (number % 3)
        world.arrived[NAME] = world.arrived.get(NAME, 0) + 7
        world.run(10)
    return world


def note(recorder: Recorder, world: World, first: int, end: int) -> None:
    for number, (before, snapshot, plan, now) in enumerate(world.rounds[first:end], start=first):
        after = world.rounds[number + 1][0] if number + 1 < len(world.rounds) else world.state
        recorder.note(before, snapshot, plan, after, now)


async def test_writes_that_come_together_lose_no_arrivals(
    history: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if two operators requested replays at the same time while the loop runs."""
    write = Database.write

    def late(self: Database, *statements: tuple[str, Sequence[Row]]) -> None:
        time.sleep(0.05 if "INTO seconds" in statements[0][0] else 0.0)
        write(self, *statements)

    monkeypatch.setattr(Database, "write", late)
    world, recorder = busy(120), Recorder(history, Policy(), observations=True)
    flushes = []
    for number, (*_, now) in enumerate(world.rounds):
        note(recorder, world, number, number + 1)
        flushes.append(asyncio.create_task(recorder.flush(now)))
        await asyncio.sleep(0)
    await asyncio.gather(*flushes)
    await recorder.flush(world.now)
    came = history.by_second(NAME, 0, int(FOREVER))
    assert sum(came.values()) == 7 * 11, "arrivals before the first round do not count"
    found = list(decide_again(history.chunks(0, FOREVER)))
    assert [now for now, _, _ in found] == [now for *_, now in world.rounds]
    assert all(then == today for _, then, today in found)


async def test_what_was_noted_during_a_write_that_failed_does_not_go_on_from_it(
    history: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, recorder = busy(120), Recorder(history, Policy(), observations=True)
    noted = threading.Event()

    def fail(*_: object) -> None:
        noted.wait(PATIENCE_S)
        raise Unavailable("The disk is full.")

    note(recorder, world, 0, 60)
    await recorder.flush(world.now)
    note(recorder, world, 60, 120)
    with monkeypatch.context() as patch:
        patch.setattr(Recordings, "add_chunk", fail)
        flushing = asyncio.create_task(recorder.flush(world.now))
        await asyncio.sleep(0.05)
        note(recorder, world, 120, 150)
        noted.set()
        await flushing
    note(recorder, world, 150, len(world.rounds))
    await recorder.flush(world.now)
    found = list(decide_again(history.chunks(0, FOREVER)))
    kept = [now for now, _, _ in found]
    assert kept[:60] == [now for *_, now in world.rounds[:60]]
    assert kept[60:] == [now for *_, now in world.rounds[150:]]
    assert all(then == today for _, then, today in found)
