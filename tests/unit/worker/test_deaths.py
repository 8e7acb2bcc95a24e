"""How a death is described, how long the next start waits, and when silence is too long."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import signal
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from services.worker.adapters.model_processes import ModelProcesses
from services.worker.adapters.process_table import kill_all, start_ticks
from services.worker.domain.deaths import MODEL, Death, of_wait_status
from services.worker.domain.restart_backoff import QUIET_S, DeathStreak, after_death
from services.worker.domain.silence import Silence, silence_limit
from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("death", "words"),
    [
        (Death(MODEL, 0.0, -9), "the model's process ended (signal 9, out of memory?)"),
        (Death(MODEL, 0.0, -9, out_of_memory=True), "the model's process ended (signal 9, out of memory)"),
        (Death(MODEL, 0.0, -11), "the model's process ended (signal 11)"),
        (Death(MODEL, 0.0, 7), "the model's process ended (exit code 7)"),
        (Death(MODEL, 0.0), "the model's process ended (unknown exit status)"),
        (
            Death(MODEL, 0.0, ended_for="no call was answered for 60 s"),
            "the model's process was ended: no call was answered for 60 s",
        ),
    ],
)
def test_the_description_of_a_death(death: Death, words: str) -> None:
    assert death.description == words


def test_wait_statuses() -> None:
    assert [of_wait_status(raw) for raw in (7 << 8, 9, 11 | 0x80, 0)] == [7, -9, -11, 0]


def test_quick_deaths_make_starts_wait_longer_and_longer() -> None:
    row, pauses = DeathStreak(), []
    for _ in range(6):
        row = after_death(row, 0.0)
        pauses.append(row.pause_s)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert row.deaths == 6


def test_a_process_that_served_for_a_while_is_restarted_at_once() -> None:
    """If it is killed every five seconds, it is back each time, and the number of quick deaths shrinks."""
    row = DeathStreak()
    for _ in range(20):
        row = after_death(row, 3.0)
        assert row.pause_s == 0.0
    assert (row.deaths, row.quick) == (20, 0)
    assert after_death(DeathStreak(5, quick=2), 3.0) == DeathStreak(6, 0.0, 1)
    assert after_death(DeathStreak(5, quick=3), 3.0) == DeathStreak(6, 1.0, 4), (
        "too soon, after deaths that were sooner"
    )


def test_a_long_service_ends_the_streak() -> None:
    assert after_death(DeathStreak(9, 5.0, 4), QUIET_S) == DeathStreak(1)


def test_a_death_by_a_suspect_does_not_delay_the_next_start() -> None:
    assert after_death(DeathStreak(5, 5.0, 3), 0.1, excused=True) == DeathStreak(5, 0.0, 3)
    assert after_death(DeathStreak(), 0.1, excused=True) == DeathStreak(1)


def test_silence_counts_while_calls_are_open() -> None:
    silence = Silence(100.0)
    for second in range(1, 31):
        silence.check(100.0 + second, 0, [30.0, 5.0])
    assert (silence.lasts_s, silence.timeout_s) == (30.0, 30.0)
    for second in range(31, 90):
        silence.check(100.0 + second, 0, [])
    assert silence.lasts_s == 30.0, "nothing is owed between two calls"
    silence.check(190.0, 0, [5.0])
    assert (silence.lasts_s, silence.timeout_s) == (31.0, 30.0), "the calls that were given up add up"
    silence.check(191.0, 1, [5.0])
    assert (silence.lasts_s, silence.timeout_s) == (0.0, 0.0), "an answer ends it"


def test_time_in_which_the_worker_did_not_run_does_not_count() -> None:
    silence = Silence(0.0)
    silence.check(600.0, 0, [30.0])
    assert silence.lasts_s == 1.0


def test_the_limit_is_at_least_the_callers_timeout() -> None:
    assert silence_limit(None, 5.0) == 60.0
    assert silence_limit(None, 600.0) == 600.0
    assert silence_limit(None, math.inf) == math.inf
    assert silence_limit(3.0, math.inf) == 3.0, "unless the Deployment says"


async def stub(tmp_path: Path) -> asyncio.subprocess.Process:
    """Start a process with the name of Triton's Python processes."""
    binary = tmp_path / "triton_python_backend_stub"
    if not binary.exists():
        shutil.copy(shutil.which("sleep") or "sleep", binary)
    process = await asyncio.create_subprocess_exec(binary, "600")
    await named(process.pid)
    return process


async def named(pid: int) -> None:
    """Wait until a process has its program's name: the kernel gives it a moment after the start."""
    while Path(f"/proc/{pid}/comm").read_text() != "triton_python_b\n":
        await asyncio.sleep(0.01)


async def test_the_end_of_a_process_is_an_event(tmp_path: Path) -> None:
    process, ended = await stub(tmp_path), asyncio.Event()
    watched = ModelProcesses(os.getpid(), [process.pid, os.getpid()], lambda _: ended.set())
    assert watched.pids == [process.pid], "only the models' processes"
    process.kill()
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    assert watched.pids == []
    watched.close()


async def test_a_stopped_process_counts_at_the_second_check(tmp_path: Path) -> None:
    process = await stub(tmp_path)
    watched = ModelProcesses(os.getpid(), [process.pid], lambda _: None)
    assert not watched.look()
    process.send_signal(signal.SIGSTOP)
    while f"{Path(f'/proc/{process.pid}/stat').read_text().rpartition(')')[2].split()[0]}" != "T":
        await asyncio.sleep(0.01)
    assert [watched.look(), watched.look()] == [False, True]
    process.send_signal(signal.SIGCONT)
    watched.close()
    process.kill()
    await process.wait()


async def test_what_a_model_forks_may_end(tmp_path: Path) -> None:
    binary = tmp_path / "triton_python_backend_stub"
    shutil.copy(shutil.which("sleep") or "sleep", binary)
    model = await asyncio.create_subprocess_exec("sh", "-c", f"{binary} 600 & echo $!; wait", stdout=PIPE)
    assert model.stdout is not None
    forked = int(await model.stdout.readline())
    await named(forked)
    watched = ModelProcesses(os.getpid(), [model.pid, forked], lambda _: None)
    assert watched.pids == []
    watched.close()
    for pid in (model.pid, forked):  # the shell ends with its child
        os.kill(pid, signal.SIGKILL)
    await model.wait()


async def test_a_process_that_has_the_pid_of_another_one_is_left_alone(tmp_path: Path) -> None:
    process = await stub(tmp_path)
    known = start_ticks([process.pid, 2**22 + 1])
    assert list(known) == [process.pid], "what has gone is not among them"
    kill_all({process.pid: "1", 2**22 + 1: "1"})
    await asyncio.sleep(0)
    assert start_ticks([process.pid]) == known
    kill_all(known)
    assert await process.wait() == -signal.SIGKILL
