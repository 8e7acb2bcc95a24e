"""The real supervisor with a child that cannot start, and that the stack does not need."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tidegate.stack.ports import free_ports
from tidegate.stack.record import RunFolder

pytestmark = pytest.mark.integration

SUPERVISOR = """
import asyncio, os, sys
from pathlib import Path
from tidegate.stack.child import MARK, Child, Probe
from tidegate.stack.supervisor import Supervisor

state, port, optional = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "optional"
env = {**os.environ, MARK: str(state)}
broken = Child("broken", ("sh", "-c", "exit 3"), env, Probe("tcp", port), 1, optional=optional)
step = Child("step", ("true",), env, None, 0)
sys.exit(asyncio.run(Supervisor((step, broken), state).run()))
"""


def supervise(state: Path, kind: str) -> subprocess.Popen[bytes]:
    (state / "run").mkdir(parents=True)
    return subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(state), str(free_ports(1)[0]), kind])


def test_the_stack_is_up_without_an_optional_child_which_is_started_until_it_runs(tmp_path: Path):
    supervisor, folder = supervise(tmp_path, "optional"), RunFolder(tmp_path / "run")
    end = time.monotonic() + PATIENCE_S
    while (record := folder.read()).phase != "running" or "exited with 3" not in record.children[1].detail:
        assert supervisor.poll() is None
        assert time.monotonic() < end, record
        time.sleep(0.05)
    assert "exited with 3" in record.children[1].detail
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(PATIENCE_S) == 0
    assert folder.read().phase == "stopped"


def test_a_child_that_the_stack_needs_ends_the_start(tmp_path: Path):
    assert supervise(tmp_path, "needed").wait(PATIENCE_S) == 1
    record = RunFolder(tmp_path / "run").read()
    assert record.phase == "failed"
    assert "broken exited with 3 while starting" in record.error
