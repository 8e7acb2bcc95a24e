"""Processes in /proc, and servers that run without a supervisor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.stack import child, launch, probes, processes, standalone
from tidegate.stack.errors import ChildFailed


def start(code: str, **env: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"print(flush=True)\n{code}"],
        stdout=subprocess.PIPE,
        env=os.environ | env,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_process_is_identified_by_its_start_time_too():
    own = processes.find(os.getpid())
    assert own is not None
    assert own.alive()
    assert not processes.Process(own.pid, own.started + 1).alive()
    assert "python" in own.command()


def test_a_zombie_is_not_alive():
    process = start("")
    found = processes.find(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not collected yet
    assert processes.find(process.pid) is None
    assert found is None or not found.alive()
    process.wait()


def test_a_process_that_ignores_sigterm_is_killed():
    process = start(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    assert process.stdout is not None
    process.stdout.readline()
    found = processes.find(process.pid)
    assert found is not None
    processes.stop([found], grace_s=0.2)
    assert process.wait() == -signal.SIGKILL


def test_a_stack_is_found_by_its_mark_and_a_model_server_by_its_folder(tmp_path: Path):
    sleeping = "import time; time.sleep(60)"
    ours = start(sleeping, **{child.MARK: str(tmp_path)})
    other = start(sleeping, **{child.MARK: f"{tmp_path}-other"})
    server = start(f"{sleeping} # {tmp_path}/replicas/x", **{child.REPLICA: "digits-v1-0-1"})
    try:
        assert {p.pid for p in processes.marked(tmp_path)} == {ours.pid, server.pid}
    finally:
        for process in (ours, other, server):
            process.kill()
            process.wait()


def test_rabbitmq_runs_without_a_supervisor(tmp_path: Path):
    with standalone.rabbitmq_running(tmp_path) as url:
        probe = child.Probe("amqp", int(url.rpartition(":")[2].rstrip("/")))
        assert any(probes.problem(probe) is None for _ in range(60))
    assert probes.problem(probe) is not None
    assert "SIGTERM received - shutting down" in (tmp_path / "rabbitmq.log").read_text()


def test_valkey_runs_without_a_supervisor(tmp_path: Path):
    with standalone.valkey_running(tmp_path) as url:
        probe = child.Probe("valkey", int(url.rpartition(":")[2].partition("/")[0]))
        assert any(probes.problem(probe) is None for _ in range(60))
    assert probes.problem(probe) == "not answering yet"


def test_an_error_at_the_start_of_a_server_shows_its_log(tmp_path: Path):
    dying = child.Child("server", ("sh", "-c", "echo no license; exit 4"), {}, child.Probe("tcp", 1), 0)
    with (
        pytest.raises(ChildFailed, match=r"(?s)server exited with 4.*no license"),
        standalone.running([dying], tmp_path),
    ):
        pass


def test_the_tail_of_a_log_begins_at_this_start(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("old\n")
    offset = launch.size(log)
    with log.open("a") as file:
        file.write("new 1\nnew 2\nnew 3\n")
    assert launch.tail(log, start=offset, lines=2) == "new 2\nnew 3"
    assert launch.tail(log, start=10**6) == "old\nnew 1\nnew 2\nnew 3"
    assert launch.tail(tmp_path / "none") == ""
