"""A run that is killed leaves no stack behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO
from tests.e2e.guard import Guard

pytestmark = pytest.mark.e2e

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.e2e.guard import Guard

guard = Guard(["touch", sys.argv[1]], dict(os.environ), Path.cwd())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_to_be_ended_is_ended_after_a_kill(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    subprocess.run([sys.executable, "-c", KILLED, mark], cwd=REPO, check=False)
    end = time.monotonic() + PATIENCE_S
    while not mark.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_nothing_is_run_where_all_went_well(tmp_path: Path) -> None:
    mark = tmp_path / "ended"
    Guard(["touch", str(mark)], {}, tmp_path).dismiss()
    assert not mark.exists()
