"""Another user of this machine, beside a running stack."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Stack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root to be another user"
    ),
]
NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]

# What the review found readable, or open.
FILES = (
    "token",
    "webhook-secret",
    "secrets/rabbitmq/worker",
    "data/registry.db",
    "data/registry.db-wal",
    "data/router-intention.json",
    "log/gateway.log",
    "replicas",
)
INTRUDER = """
import asyncio, sys
from tidegate.kernel.broker.amqp.connection import connect
async def main():
    for user in ("", "guest:guest@"):
        try:
            await connect(f"amqp://{user}127.0.0.1:{sys.argv[1]}/", name="x", heartbeat_s=20, confirms=True)
            print("IN")
        except OSError as error:
            print("refused" if "ACCESS_REFUSED" in str(error) else error)
asyncio.run(main())
"""


def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NOBODY, *command], capture_output=True, text=True, check=False)


def test_nothing_of_the_state_folder_can_be_read(stack: Stack, served: str) -> None:
    state = stack.settings.state_path
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    there = [state / name for name in FILES if (state / name).exists()]
    assert len(there) >= len(FILES) - 2  # the webhook's secret and the WAL come later
    for path in there:
        assert as_nobody("cat", str(path)).returncode != 0, path
        assert as_nobody("ls", str(path)).returncode != 0, path


def test_what_is_written_is_for_its_owner_alone(stack: Stack, served: str) -> None:
    """Also where somebody opens the state folder, or copies it with its modes."""
    state = stack.settings.state_path
    written = [*(state / "data").rglob("*"), *(state / "replicas").rglob("assignment.json")]
    wide = [path for path in written if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077]
    # A cached artifact is linked into a model's folder, where the model's own user reads it.
    assert not [path for path in wide if "cache" not in path.parts]
    assert written


def test_the_broker_and_the_stores_do_not_let_it_in(stack: Stack) -> None:
    found = as_nobody(sys.executable, "-P", "-c", INTRUDER, str(stack.settings.rabbitmq_port))
    if found.returncode != 0:  # nobody cannot read this interpreter's packages
        found = subprocess.run(
            [sys.executable, "-P", "-c", INTRUDER, str(stack.settings.rabbitmq_port)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert found.stdout.split() == ["refused", "refused"], found


def test_no_region_of_shared_memory_can_be_read(stack: Stack, served: str) -> None:
    names = [path.read_text().strip() for path in stack.settings.state_path.glob("replicas/*/shared-memory")]
    regions = [path for name in names for path in Path("/dev/shm").glob(f"{name}*")]
    assert regions
    assert not [path for path in regions if stat.S_IMODE(path.stat().st_mode) & 0o077]
