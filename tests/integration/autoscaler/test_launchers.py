"""Test what every launcher must do, on processes and on containers: launch, adopt, drain, kill."""

from __future__ import annotations

import asyncio
import time

import pytest

from services.autoscaler.domain.launcher import NameTaken, fingerprint
from tests.conftest import PATIENCE_S

ONE, TWO = "digits-v1-0-1", "digits-v1-1-1"
LONG_AFTER_S = 60.0


async def one(launcher):
    running = await launcher.list()
    assert len(running) == 1
    return running[0]


async def gone(launcher):
    """Wait until the only worker has ended, and return its replica."""
    async with asyncio.timeout(PATIENCE_S):
        while (found := await one(launcher)).alive:
            await asyncio.sleep(0.02)
    return found


async def test_launch_list_and_the_fence(harness, assign):
    launcher = harness.launcher()
    work = assign(ONE, drain_limit_s=7)
    await launcher.launch(work)
    assert (await one(launcher)).alive, "it counts as live before it has its lock"
    harness.until_up(ONE)
    found = await one(launcher)
    assert (found.replica, found.deployment, found.slot, found.generation) == (ONE, "digits-v1", 0, 1)
    assert found.launched_at == pytest.approx(work.launched_at, abs=0.01)
    assert found.fingerprint == fingerprint(work.deployment)
    assert found.drain_limit_s == 7
    assert found.draining_since is None
    with pytest.raises(NameTaken):
        await launcher.launch(work)
    assert (await one(launcher)).alive, "the losing launch must not end the winner's worker"
    assert harness.output(ONE) == "up\n"


async def test_one_of_two_that_launch_a_name_at_once_wins(harness, assign):
    launches = (harness.launcher().launch(assign(ONE)) for _ in range(2))
    ends = await asyncio.gather(*launches, return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["NameTaken", "NoneType"]
    harness.until_up(ONE)
    assert (await one(harness.launcher())).alive


async def test_another_launcher_adopts_and_drains(harness, assign):
    await harness.launcher().launch(assign(ONE))
    harness.until_up(ONE)
    launcher = harness.launcher()
    adopted = await one(launcher)
    assert adopted.alive
    assert adopted.fingerprint == fingerprint(assign(ONE).deployment)
    assert adopted.draining_since is None
    with pytest.raises(NameTaken):
        await launcher.launch(assign(ONE))
    await launcher.drain(ONE)
    assert (await one(launcher)).draining_since == pytest.approx(time.time(), abs=10)
    assert (await gone(launcher)).draining_since is not None
    harness.until(lambda: not harness.alive(ONE), "the worker and its server are gone")
    await launcher.kill(ONE)
    assert await launcher.list() == []
    assert harness.left() == []
    assert "drained" in harness.output(ONE), "its output is kept after its end"


async def test_a_drain_goes_on_when_its_autoscaler_is_replaced(harness, assign):
    first = harness.launcher("deaf")
    await first.launch(assign(ONE))
    harness.until_up(ONE)
    await first.drain(ONE)
    since = (await one(first)).draining_since
    next_one = harness.launcher("deaf")
    assert (await one(next_one)).draining_since == since
    await next_one.drain(ONE)
    assert (await one(next_one)).draining_since == since, "its limit counts from the first order to drain"
    await next_one.kill(ONE)
    await next_one.launch(assign(ONE))
    assert (await one(next_one)).draining_since is None, "the drain time was removed with the container"


@pytest.mark.parametrize("mode", ["", "own session"])
async def test_a_killed_worker_is_seen_and_its_server_does_not_outlive_it(harness, assign, mode):
    launcher = harness.launcher(mode)
    await launcher.launch(assign(ONE))
    harness.until_up(ONE)
    up = time.time()
    harness.crash(ONE)
    dead = await gone(launcher)
    assert up <= dead.ended_at <= time.time()
    assert dead.ending == "the worker was ended by SIGKILL; last log line: up"
    assert not dead.out_of_memory
    await launcher.kill(ONE)
    assert harness.alive(ONE) == 0
    assert await launcher.list() == []


async def test_kill_ends_a_worker_that_does_not_listen(harness, assign):
    launcher = harness.launcher("deaf")
    await launcher.launch(assign(ONE))
    harness.until_up(ONE)
    await launcher.drain(ONE)
    assert (await one(launcher)).alive
    await launcher.kill(ONE)
    assert harness.alive(ONE) == 0
    assert harness.left() == []
    await launcher.kill(ONE)


async def test_a_worker_that_fails_at_once_tells_why(harness, assign):
    launcher = harness.launcher("broken")
    await launcher.launch(assign(ONE))
    ending = (await gone(launcher)).ending
    assert ending == "the worker exited with code 3; last log line: Traceback: no module named onnx"


async def test_a_launch_that_was_cut_off_is_recovered(harness, assign):
    """The launcher was killed between creating the name and the start. After a while the replica is dead."""
    harness.cut_off(ONE)
    assert (await one(harness.launcher())).alive
    late = harness.launcher(late_s=LONG_AFTER_S)
    with pytest.raises(NameTaken):
        await late.launch(assign(ONE))
    assert not (await one(late)).alive
    await late.kill(ONE)
    assert harness.left() == []


async def test_two_stacks_with_replicas_of_the_same_name_do_not_meet(harness, assign):
    other = harness.other()
    mine, theirs = harness.launcher(), other.launcher()
    await mine.launch(assign(ONE))
    await theirs.launch(assign(ONE))
    harness.until_up(ONE)
    other.until_up(ONE)
    await mine.kill(ONE)
    assert harness.alive(ONE) == 0
    assert other.alive(ONE) >= 2
    assert (await one(theirs)).alive


async def test_several_at_once(harness, assign):
    launcher = harness.launcher()
    names = [f"digits-v1-{slot}-1" for slot in range(3)]
    await asyncio.gather(*(launcher.launch(assign(name)) for name in names))
    harness.until_up(*names)
    assert [each.replica for each in await launcher.list()] == names
    await asyncio.gather(*(launcher.kill(name) for name in names))
    assert harness.left() == []


async def test_unknown_names_are_passed_over(harness):
    launcher = harness.launcher()
    await launcher.drain(TWO)
    await launcher.kill(TWO)
    assert await launcher.list() == []
    assert harness.left() == []
