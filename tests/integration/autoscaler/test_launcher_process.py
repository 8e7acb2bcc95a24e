"""The process launcher on real processes: launch, adopt, drain, kill, sweep, and what is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE

import pytest

from services.autoscaler.adapters import procfs
from services.autoscaler.adapters.launcher_process import LAUNCH_GRACE_S, ProcessLauncher, ProcessPlan
from services.autoscaler.adapters.sweep import sweep
from services.autoscaler.domain.launcher import LaunchFailed, NameTaken, fingerprint

ONE, TWO = "digits-v1-0-1", "digits-v1-1-1"


async def one(launcher):
    running = await launcher.list()
    assert len(running) == 1
    return running[0]


async def test_launch_list_and_the_fence(yard, assign):
    launcher = yard.launcher()
    work = assign(ONE, drain_limit_s=7)
    await launcher.launch(work)
    starting = await one(launcher)
    assert starting.alive, "before it has its lock it is known by its process"
    yard.until_up(ONE)
    found = await one(launcher)
    assert (found.replica, found.deployment, found.slot, found.generation) == (ONE, "digits-v1", 0, 1)
    assert found.pid == int((yard.state / "replicas" / ONE / "lock").read_text())
    assert found.launched_at == pytest.approx(work.launched_at)
    assert found.fingerprint == fingerprint(work.deployment)
    assert found.drain_limit_s == 7
    with pytest.raises(NameTaken):
        await launcher.launch(work)
    assert os.getsid(found.pid) == found.pid
    assert "up" in launcher.log_path(ONE).read_text()


async def test_another_launcher_adopts_and_drains(yard, assign):
    await yard.launcher().launch(assign(ONE))
    yard.until_up(ONE)
    launcher = yard.launcher()
    adopted = await one(launcher)
    assert adopted.alive
    assert adopted.draining_since is None
    with pytest.raises(NameTaken):
        await launcher.launch(assign(ONE))
    await launcher.drain(ONE)
    assert (await one(launcher)).draining_since == pytest.approx(time.time(), abs=5)
    yard.until(lambda: not yard.processes(ONE), "the worker and its server are gone")
    assert not (await one(launcher)).alive
    await launcher.kill(ONE)
    assert await launcher.list() == []
    assert not (yard.state / "replicas" / ONE).exists()
    assert "drained" in launcher.log_path(ONE).read_text(), "logs outlive their replica"


@pytest.mark.parametrize("mode", ["", "own session"])
async def test_a_killed_worker_is_seen_and_its_server_is_ended(yard, assign, mode):
    launcher = yard.launcher(mode)
    await launcher.launch(assign(ONE))
    yard.until_up(ONE)
    pid = (await one(launcher)).pid
    os.kill(pid, signal.SIGKILL)
    yard.until(lambda: procfs.read(pid) is None, "the worker is dead")
    dead = await one(launcher)
    assert not dead.alive
    assert dead.ending == "the worker was ended by SIGKILL; its last words: up"
    assert yard.processes(ONE), "its server is still alive: that is what has to be ended"
    await launcher.kill(ONE)
    assert yard.processes(ONE) == []
    assert await launcher.list() == []


async def test_kill_ends_a_worker_that_does_not_listen(yard, assign):
    launcher = yard.launcher("deaf")
    await launcher.launch(assign(ONE))
    yard.until_up(ONE)
    await launcher.drain(ONE)
    assert (await one(launcher)).alive
    await launcher.kill(ONE)
    assert yard.processes(ONE) == []
    await launcher.kill(ONE)


async def test_a_worker_that_fails_at_once_tells_why(yard, assign):
    launcher = yard.launcher("broken")
    await launcher.launch(assign(ONE))
    yard.until(lambda: launcher.log_path(ONE).read_text() != "", "its last words")
    while (found := await one(launcher)).alive:
        await asyncio.sleep(0.01)
    assert found.ending == "the worker exited with code 3; its last words: Traceback: no module named onnx"


async def test_a_command_that_is_not_there_fails_the_launch_and_frees_the_name(yard, assign):
    launcher = ProcessLauncher(ProcessPlan(["/nowhere/python"], yard.state))
    with pytest.raises(LaunchFailed, match="nowhere"):
        await launcher.launch(assign(ONE))
    assert await launcher.list() == []


async def test_a_launch_that_was_cut_off_is_recovered(yard, assign):
    """Killed between making the folder and the start: nothing runs, and after a while the name is dead."""
    cut_off = yard.state / "replicas" / ONE
    cut_off.mkdir(parents=True)
    early = ProcessLauncher(ProcessPlan([], yard.state))
    assert (await one(early)).alive
    late = ProcessLauncher(ProcessPlan([], yard.state), clock=lambda: time.time() + LAUNCH_GRACE_S + 1)
    assert not (await one(late)).alive
    await late.kill(ONE)
    assert await late.list() == []


async def test_a_worker_without_its_lock_yet_is_adopted_by_its_mark(yard, assign):
    """Killed right after the start, before the process was noted."""
    await yard.launcher("slow").launch(assign(ONE))
    # The kernel shows a new program's environment a moment after its start.
    yard.until(lambda: yard.processes(ONE) != [], "its mark")
    (yard.state / "replicas" / ONE / "process").unlink()
    late = ProcessLauncher(ProcessPlan([], yard.state), clock=lambda: time.time() + LAUNCH_GRACE_S + 1)
    assert (await one(late)).alive
    await late.kill(ONE)
    assert yard.processes(ONE) == []


async def test_a_pid_that_was_given_to_another_process_is_left_alone(yard, assign):
    """The folder names a pid and a start tick; the process of that pid started at another time."""
    bystander = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        folder = yard.state / "replicas" / ONE
        folder.mkdir(parents=True)
        (folder / "process").write_text(f"{bystander.pid} 1")
        (folder / "lock").write_text(str(bystander.pid))
        launcher = yard.launcher()
        assert not (await one(launcher)).alive
        await launcher.drain(ONE)
        await launcher.kill(ONE)
        assert bystander.returncode is None
    finally:
        bystander.kill()
        await bystander.wait()


async def test_two_stacks_with_replicas_of_the_same_name_do_not_meet(yard, assign, tmp_path):
    other = type(yard)(tmp_path / "other") if (tmp_path / "other").mkdir() is None else None
    assert other is not None
    try:
        mine, theirs = yard.launcher(), other.launcher()
        await mine.launch(assign(ONE))
        await theirs.launch(assign(ONE))
        yard.until_up(ONE)
        other.until_up(ONE)
        await mine.kill(ONE)
        assert yard.processes(ONE) == []
        assert len(other.processes(ONE)) >= 2
        assert (await one(theirs)).alive
    finally:
        other.clear()


async def test_logs_of_dead_replicas_are_bounded(yard, assign, monkeypatch):
    monkeypatch.setattr("services.autoscaler.adapters.launcher_process.KEPT_LOGS", 2)
    launcher = yard.launcher("broken")
    for generation in range(1, 5):
        await launcher.launch(assign(f"digits-v1-0-{generation}"))
        await launcher.kill(f"digits-v1-0-{generation}")
    assert len(list((yard.state / "log").glob("worker-*.log"))) == 2


async def test_sweep_ends_everything_the_orderly_way_first(yard, assign):
    launcher = yard.launcher()
    await launcher.launch(assign(ONE))
    await yard.launcher("deaf").launch(assign(TWO))
    yard.until_up(ONE, TWO)
    started = time.monotonic()
    assert await sweep(yard.state, grace_s=0.5) == [ONE, TWO]
    assert time.monotonic() - started < 5
    assert procfs.marked_in(yard.state) == set()
    assert yard.processes(ONE) == yard.processes(TWO) == []
    assert yard.folders() == []
    assert "drained" in launcher.log_path(ONE).read_text()


async def test_the_sweep_command(yard, assign):
    await yard.launcher("messy").launch(assign(ONE))
    yard.until_up(ONE)
    command = ["-m", "services.autoscaler", "sweep", "--grace", "5"]
    environment = {**os.environ, "TIDEGATE_STATE_DIR": str(yard.state)}
    done = await asyncio.create_subprocess_exec(sys.executable, *command, env=environment, stdout=PIPE)
    said, _ = await asyncio.wait_for(done.communicate(), 30)
    assert (done.returncode, said) == (0, b"Ended 1 replicas.\n")
    assert yard.processes(ONE) == []
