"""Test the process launcher on real processes. Tests of all launchers are in test_launchers.py."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE

import pytest

from services.autoscaler.adapters.process import procfs
from services.autoscaler.adapters.process.launcher import LAUNCH_GRACE_S, ProcessLauncher, ProcessPlan
from services.autoscaler.application.end_replicas import end_replicas
from services.autoscaler.domain.costs.lives import NS, OBSERVED, LifeBook
from services.autoscaler.domain.launcher import LaunchFailed
from tests.conftest import PATIENCE_S
from tests.integration.autoscaler.test_launchers import gone, one
from tidegate.kernel.protocol.prices import PriceList

ONE, TWO = "digits-v1-0-1", "digits-v1-1-1"


@pytest.fixture
def harness(processes):
    return processes


async def test_its_pid_and_session(harness, assign):
    launcher = harness.launcher()
    await launcher.launch(assign(ONE))
    harness.until_up(ONE)
    found = await one(launcher)
    assert found.pid == int((harness.state / "replicas" / ONE / "lock").read_text())
    assert os.getsid(found.pid) == found.pid
    assert "up" in launcher.log_path(ONE).read_text()


@pytest.mark.parametrize("mode", ["", "own session"])
async def test_what_a_killed_worker_leaves_is_ended(harness, assign, mode):
    launcher = harness.launcher(mode)
    await launcher.launch(assign(ONE))
    harness.until_up(ONE)
    harness.crash(ONE)
    assert not (await one(launcher)).alive
    assert harness.processes(ONE), "its server still lives and has to be ended"
    await launcher.kill(ONE)
    assert harness.processes(ONE) == []


@pytest.mark.parametrize("adopted", [False, True])
async def test_the_end_of_a_killed_worker_is_booked_exactly(harness, assign, adopted):
    """The ledger books the end at the moment of the end, and not at the next round."""
    launcher, book, prices = harness.launcher(), LifeBook(), PriceList()
    await launcher.launch(assign(ONE))
    harness.until_up(ONE)
    launcher = harness.launcher() if adopted else launcher
    seen = await one(launcher)
    book.note([seen], {}, {}, prices, time.time())
    killed_at = time.time()
    harness.crash(ONE)
    await asyncio.sleep(0.01)  # the event loop reads the pidfd
    looked_at = time.time()
    assert book.note(await launcher.list(), {}, {}, prices, looked_at)
    ended_at = (await one(launcher)).ended_at
    assert ended_at is not None
    assert ended_at == book.lives[ONE].gone_at
    assert killed_at <= ended_at <= looked_at
    bookings, _ = book.book({}, prices, time.time())
    observed = [amount.spent.ns for place, amount in bookings.items() if place.part.kind == OBSERVED]
    assert sum(observed) == pytest.approx((ended_at - seen.launched_at) * NS, abs=1000)


async def test_a_worker_that_ended_between_two_rounds_has_an_end(harness, assign):
    launcher = harness.launcher("broken")
    started = assign(ONE)
    await launcher.launch(started)
    harness.until(lambda: "no module" in harness.output(ONE), "it has failed")
    dead = await gone(launcher)
    assert started.launched_at <= dead.ended_at <= time.time()
    await launcher.kill(ONE)


async def test_a_command_that_is_not_there_fails_the_launch_and_frees_the_name(harness, assign):
    launcher = ProcessLauncher(ProcessPlan(["/nowhere/python"], harness.state))
    with pytest.raises(LaunchFailed, match="nowhere"):
        await launcher.launch(assign(ONE))
    assert await launcher.list() == []


@pytest.mark.parametrize("wish", [{"image": "ours/worker"}, {"resources": {"shm_mb": 64}}])
async def test_what_only_containers_have_is_refused_and_not_ignored(harness, assign, wish):
    with pytest.raises(LaunchFailed, match="only containers support this option"):
        await harness.launcher().launch(assign(ONE, **wish))
    assert await harness.launcher().list() == []


async def test_its_memory_is_measured_and_its_limit_is_for_the_worker(harness, assign):
    launcher = harness.launcher()
    await launcher.launch(assign(ONE, resources={"memory_mb": 512}))
    harness.until_up(ONE)
    assert (harness.state / "replicas" / ONE / "memory-limit").read_text() == "512"
    # A new launcher measures at its first listing. By now the worker and its child run.
    measured = (await one(harness.launcher())).memory_mb
    own = sum(procfs.memory_by_session()[s] for s in {process.session for process in harness.processes(ONE)})
    assert measured == pytest.approx(own / 2**20, abs=32)
    assert measured % 16 == 0


async def test_the_cgroup_of_a_killed_workers_model_goes_with_its_folder(harness, assign, tmp_path):
    launcher = harness.launcher()
    ours, others = tmp_path / "tidegate-0123", tmp_path / "somebody"
    for replica, group in ((ONE, ours), (TWO, others)):
        await launcher.launch(assign(replica))
        harness.until_up(replica)
        group.mkdir()
        (harness.state / "replicas" / replica / "memory-group").write_text(str(group))
        await launcher.kill(replica)
    assert not ours.exists()
    assert others.exists(), "a cgroup of another owner is not removed"


async def test_a_worker_without_its_lock_yet_is_adopted_by_its_mark(harness, assign):
    """The launcher was killed right after the start, before it noted the process."""
    await harness.launcher("slow").launch(assign(ONE))
    # The kernel shows a new program's environment a moment after its start.
    harness.until(lambda: harness.processes(ONE) != [], "its mark")
    (harness.state / "replicas" / ONE / "process").unlink()
    late = ProcessLauncher(ProcessPlan([], harness.state), clock=lambda: time.time() + LAUNCH_GRACE_S + 1)
    assert (await one(late)).alive
    await late.kill(ONE)
    assert harness.processes(ONE) == []


async def test_a_pid_that_was_given_to_another_process_is_left_alone(harness, assign):
    """The folder has a pid and a start tick, but the process with that pid started at another time."""
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        folder = harness.state / "replicas" / ONE
        folder.mkdir(parents=True)
        (folder / "process").write_text(f"{bystander.pid} 1")
        (folder / "lock").write_text(str(bystander.pid))
        launcher = harness.launcher()
        assert not (await one(launcher)).alive
        await launcher.drain(ONE)
        await launcher.kill(ONE)
        assert bystander.returncode is None
    finally:
        bystander.kill()
        await bystander.wait()


async def test_logs_of_dead_replicas_are_bounded(harness, assign, monkeypatch):
    monkeypatch.setattr("services.autoscaler.domain.log_retention.MOST_EACH", 2)
    launcher = harness.launcher("broken")
    for generation in range(1, 5):
        await launcher.launch(assign(f"digits-v1-0-{generation}"))
        await launcher.kill(f"digits-v1-0-{generation}")
    assert len(list((harness.state / "log").glob("worker-*.log"))) == 2


async def test_sweep_ends_everything_the_orderly_way_first(harness, assign):
    launcher = harness.launcher()
    await launcher.launch(assign(ONE))
    await harness.launcher("deaf").launch(assign(TWO))
    harness.until_up(ONE, TWO)
    assert await end_replicas(harness.launcher(), grace_s=0.5) == [ONE, TWO]
    assert procfs.marked_in(harness.state) == set()
    assert harness.processes(ONE) == harness.processes(TWO) == []
    assert harness.folders() == []
    assert "drained" in launcher.log_path(ONE).read_text()


async def test_the_sweep_command(harness, assign):
    await harness.launcher("messy").launch(assign(ONE))
    harness.until_up(ONE)
    command = ["-m", "services.autoscaler", "sweep", "--grace", "5"]
    environment = {**os.environ, "TIDEGATE_STATE_DIR": str(harness.state)}
    done = await asyncio.create_subprocess_exec(sys.executable, *command, env=environment, stdout=PIPE)
    said, _ = await asyncio.wait_for(done.communicate(), PATIENCE_S)
    assert (done.returncode, said) == (0, b"Ended 1 replicas.\n")
    assert harness.processes(ONE) == []
