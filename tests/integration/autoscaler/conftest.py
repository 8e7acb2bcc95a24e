"""A process launcher whose workers are a small script: lock, a child of its own, drain on SIGTERM."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.autoscaler.adapters import procfs
from services.autoscaler.adapters.launcher_process import ProcessLauncher, ProcessPlan
from services.autoscaler.adapters.replica_folder import ReplicaFolder
from services.autoscaler.domain.launcher import parse_replica
from tidegate.protocol.models import Assignment, Deployment, Version

# As the worker does it: the lock for life, the pid in it, a server of its own (here `sleep`).
WORKER = """
import fcntl, os, signal, subprocess, sys, time
folder, mode = sys.argv[1], os.environ.get("MODE", "")
if mode == "broken":
    print("Traceback: no module named onnx", flush=True); sys.exit(3)
if mode == "slow":
    time.sleep(1000)
lock = open(folder + "/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
# Of the environment only the mark goes on, as to a model server; it stands in the folder.
mark = {"TIDEGATE_REPLICA": os.environ["TIDEGATE_REPLICA"], "PATH": os.environ["PATH"]}
apart = mode == "own session"
server = subprocess.Popen(["sleep", "1000"], env=mark, cwd=folder, start_new_session=apart)
lock.write(str(os.getpid())); lock.flush()
def drain(*_):
    if mode != "deaf":
        server.kill() if mode != "messy" else None
        print("drained", flush=True); os._exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
while True:
    time.sleep(1000)
"""

BORN = datetime(2024, 1, 1, tzinfo=UTC)


def assignment(replica: str, **given) -> Assignment:
    parsed = parse_replica(replica)
    assert parsed is not None
    name, _, generation = parsed
    wanted = {"name": name, "model": "digits", "version": 1, "revision": 1, "created_at": BORN}
    return Assignment(
        replica=replica,
        generation=generation,
        deployment=Deployment.model_validate({**wanted, **given}),
        version=Version(
            model="digits",
            number=1,
            format="onnx",
            artifact_sha256="0" * 64,
            artifact_size=1,
            filename="model.onnx",
            created_at=BORN,
        ),
        registry_url="http://127.0.0.1:1",
        launched_at=time.time(),
    )


class Yard:
    """A state folder with launchers on it; everything that was started ends with the test."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.script = state / "worker.py"
        self.script.write_text(WORKER)
        self._launchers: list[ProcessLauncher] = []

    def launcher(self, mode: str = "") -> ProcessLauncher:
        """A launcher as after a restart: it has no children yet."""
        command = [sys.executable, "-S", "-E", str(self.script)]
        self._launchers.append(ProcessLauncher(ProcessPlan(command, self.state, {"MODE": mode})))
        return self._launchers[-1]

    def processes(self, replica: str) -> list[procfs.Process]:
        folder = self.state / "replicas" / replica
        return procfs.owned(procfs.Owner(replica, folder, self.state, 0))

    def until(self, true: Callable[[], bool | None], what: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.01)

    def until_up(self, *replicas: str) -> None:
        """Wait until the workers have their lock and their own child."""
        for replica in replicas:
            self.until(ReplicaFolder(self.state / "replicas" / replica).lock_held, f"{replica} is up")

    def clear(self) -> None:
        for replica in procfs.marked_in(self.state) | {p.name for p in self.folders()}:
            for process in self.processes(replica):
                procfs.send(process, signal.SIGKILL)
        for child in (child for each in self._launchers for child in each._children.values()):
            child.wait(timeout=5)

    def folders(self) -> list[Path]:
        replicas = self.state / "replicas"
        return sorted(replicas.iterdir()) if replicas.is_dir() else []


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    found = Yard(tmp_path)
    yield found
    found.clear()


@pytest.fixture(scope="session")
def assign() -> Callable[..., Assignment]:
    """Builds an assignment for a replica's name."""
    return assignment
