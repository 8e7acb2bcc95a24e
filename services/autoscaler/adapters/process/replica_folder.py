"""The folder of one replica: ``<state>/replicas/<replica>``. Its existence fences the name.

assignment.json   what the worker was started with           written here, before the start
token             opens the replica's artifact               written here, before the start
fingerprint       of the configuration it was started with   written here
launch            when, and how long it may drain            written here
gpus              what it holds of GPUs, if anything         written here, before the start
memory-limit      MiB that its model may take, if limited    written here, before the start
memory-group      the cgroup of its model's processes        written by the worker
process           pid and start tick of the worker           written here, after the start
lock              held by the worker for its life, its pid   written by the worker
shared-memory     how its Triton's regions in /dev/shm are named   written by the worker
model-user        the user of its model's process, where it has one of its own   written by the worker
draining          since when it is asked to finish           written here
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from services.autoscaler.adapters.process import procfs
from services.autoscaler.domain.gpus import Shares, from_label, to_label
from services.autoscaler.domain.launcher import LaunchSpec, NameTaken
from tidegate.kernel import model_users

ASSIGNMENT = "assignment.json"
SHARED_MEMORY = Path("/dev/shm")


class ReplicaFolder:
    """Reads and writes one replica's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replica = path.name

    def create(self, start: LaunchSpec, token: str, gpus: Shares | None = None) -> None:
        """Take the name and write what the worker reads, and its GPUs. Raises ``NameTaken``."""
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            raise NameTaken(f"A replica {self.replica} exists already.") from None
        if gpus:
            self._write("gpus", to_label(gpus))
        if start.resources.memory_mb:
            self._write("memory-limit", str(start.resources.memory_mb))
        self._write("fingerprint", start.fingerprint)
        self._write("launch", f"{start.launched_at} {start.drain_limit_s}")
        self._write("token", token)
        # Last and whole: a folder without it was interrupted, and no worker was started in it.
        self._write(ASSIGNMENT, start.document)

    def launched(self) -> tuple[float, float]:
        """When it was launched (epoch seconds) and how long it may drain; what a cut off launch left has no
        time to drain.
        """
        try:
            at, drain_limit_s = map(float, self._read("launch").split())
        except ValueError:
            return self.born(), 0.0
        return at, drain_limit_s

    def fingerprint(self) -> str:
        """The fingerprint it was launched with, empty when not known."""
        return self._read("fingerprint")

    def gpus(self) -> dict[str, int]:
        """Return what it holds of GPUs, as MiB by UUID; empty when it holds none."""
        return from_label(self._read("gpus"))

    def note_process(self, pid: int) -> None:
        """Remember the worker's process, which has not taken its lock yet."""
        process = procfs.read(pid)
        if process is not None:
            self._write("process", f"{pid} {process.started}")

    def noted_process(self) -> procfs.Process | None:
        """The process that was noted, if that very process is alive."""
        pid, _, started = self._read("process").partition(" ")
        process = procfs.read(int(pid)) if pid.isdecimal() else None
        return process if process is not None and str(process.started) == started else None

    def worker_pid(self) -> int:
        """The worker's pid as it was noted or as it wrote it itself; 0 when neither is there."""
        for found in (self._read("lock"), self._read("process").partition(" ")[0]):
            if found.strip().isdecimal():
                return int(found)
        return 0

    def model_user(self) -> int:
        """The user of the model's process as the worker noted it; 0 when it has none of its own."""
        noted = self._read(model_users.NOTE).strip()
        return int(noted) if noted.isdecimal() else 0

    def lock_held(self) -> bool | None:
        """Whether a worker lives; None when none has written its pid yet.

        Probed only after the pid is there, as the worker has its lock by then and takes it once:
        an earlier probe could be in the way just when the worker takes it.
        """
        if not self._read("lock").strip():
            return None
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def mark_draining(self, at: float) -> None:
        """Remember since when the replica is asked to finish; the first time counts."""
        if self.draining_since() is None:
            self._write("draining", f"{at:.3f}")

    def draining_since(self) -> float | None:
        """Since when it is asked to finish (epoch seconds); None when it is not."""
        try:
            return float(self._read("draining"))
        except ValueError:
            return None

    def born(self) -> float:
        """When the folder was made, or last changed (epoch seconds)."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def remove(self) -> None:
        """Free the name, and the shared memory that a killed worker's Triton left."""
        prefix = self._read("shared-memory").strip()
        if prefix.startswith("tidegate-"):
            for left in SHARED_MEMORY.glob(f"{prefix}*"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        group = Path(self._read("memory-group").strip())
        if group.name.startswith("tidegate-"):
            with contextlib.suppress(OSError):  # the worker has removed it
                group.rmdir()
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    def _write(self, name: str, text: str) -> None:
        # Under another name first: a reader, or we after a crash, never sees half of it.
        temporary = self.path / f".{name}.new"
        with contextlib.suppress(FileNotFoundError):  # the folder went meanwhile: nothing to note
            temporary.touch(mode=0o600)
            temporary.write_text(text)
            temporary.replace(self.path / name)
