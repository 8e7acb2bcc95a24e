"""The folder of one replica: ``<state>/replicas/<replica>``.

While the folder exists, no other replica can get this name. The lines below name each file, its content, and
its writer.

assignment.json   the worker's assignment                       by the launcher, before the start
token             secret for access to the replica's artifact   by the launcher, before the start
fingerprint       fingerprint of the configuration at launch    by the launcher
launch            launch time and drain limit                   by the launcher
gpus              the replica's GPU shares, if any              by the launcher, before the start
memory-limit      memory limit of the model in MiB, if any      by the launcher, before the start
memory-group      the cgroup of the model's processes           by the worker
process           pid and start tick of the worker              by the launcher, after the start
lock              worker's pid; locked while the worker lives   by the worker
shared-memory     prefix of Triton's regions in /dev/shm        by the worker
model-user        user id of the model's process, if separate   by the worker
draining          time when the drain began                     by the launcher
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
    """The folder of one replica."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replica = path.name

    def create(self, start: LaunchSpec, token: str, gpus: Shares | None = None) -> None:
        """Create the folder and the files for the worker. Raise ``NameTaken`` if the folder exists."""
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
        # This file is written last. If a folder lacks this file, its launch was interrupted before a worker
        # started.
        self._write(ASSIGNMENT, start.document)

    def launched(self) -> tuple[float, float]:
        """Return the launch time (seconds since the epoch) and the drain limit in seconds.

        For an interrupted launch, return the time when the folder last changed, and 0.
        """
        try:
            at, drain_limit_s = map(float, self._read("launch").split())
        except ValueError:
            return self.born(), 0.0
        return at, drain_limit_s

    def fingerprint(self) -> str:
        """Return the fingerprint of the configuration at the launch; empty if not known."""
        return self._read("fingerprint")

    def gpus(self) -> dict[str, int]:
        """Return the replica's GPU shares in MiB, by the GPU's UUID; empty if the replica has none."""
        return from_label(self._read("gpus"))

    def note_process(self, pid: int) -> None:
        """Store the worker's pid and start time. They identify the worker until it holds its lock."""
        process = procfs.read(pid)
        if process is not None:
            self._write("process", f"{pid} {process.started}")

    def noted_process(self) -> procfs.Process | None:
        """Return the worker's process from the file ``process``; None if it has ended or was not stored."""
        pid, _, started = self._read("process").partition(" ")
        process = procfs.read(int(pid)) if pid.isdecimal() else None
        return process if process is not None and str(process.started) == started else None

    def worker_pid(self) -> int:
        """Return the worker's pid from the file ``lock``, else from ``process``; 0 if neither has it."""
        for found in (self._read("lock"), self._read("process").partition(" ")[0]):
            if found.strip().isdecimal():
                return int(found)
        return 0

    def model_user(self) -> int:
        """Return the user id of the model's process; 0 if the model has no separate user."""
        noted = self._read(model_users.NOTE).strip()
        return int(noted) if noted.isdecimal() else 0

    def lock_held(self) -> bool | None:
        """Return True if the worker holds its lock; None if the worker has not written its pid yet.

        Before the pid is written, the lock is not tested. The test itself takes the lock for a moment, so it
        could prevent the worker from taking the lock.
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
        """Store when the drain began, unless a time is already stored."""
        if self.draining_since() is None:
            self._write("draining", f"{at:.3f}")

    def draining_since(self) -> float | None:
        """Return when the drain began (seconds since the epoch); None if the replica is not draining."""
        try:
            return float(self._read("draining"))
        except ValueError:
            return None

    def born(self) -> float:
        """Return when the folder last changed (seconds since the epoch)."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0

    def remove(self) -> None:
        """Remove the folder, and the shared memory and cgroup that a killed worker did not remove."""
        prefix = self._read("shared-memory").strip()
        if prefix.startswith("tidegate-"):
            for left in SHARED_MEMORY.glob(f"{prefix}*"):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        group = Path(self._read("memory-group").strip())
        if group.name.startswith("tidegate-"):
            with contextlib.suppress(OSError):  # the worker may have removed the cgroup already
                group.rmdir()
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except (OSError, UnicodeDecodeError):
            return ""

    def _write(self, name: str, text: str) -> None:
        # The file is written under another name first, so that no reader sees half of it.
        temporary = self.path / f".{name}.new"
        with contextlib.suppress(FileNotFoundError):  # the folder was removed meanwhile
            temporary.touch(mode=0o600)
            temporary.write_text(text)
            temporary.replace(self.path / name)
