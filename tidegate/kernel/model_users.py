"""Linux users for the processes of models. Such a user is a user id without an account.

Each user id has a file with the id as its name. A worker claims a user: it locks this file, and holds the
lock while the worker lives. So two models never have the same user, and every process of a claimed user
belongs to the worker with the lock. An empty file means that the user has no processes. Then a new worker
does not search for processes of an earlier worker.

A model can write to the temporary folders of its machine. Its files there are deleted with its processes,
because the next model with the same user could read them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tidegate.kernel.errors import Unavailable

PROC = Path("/proc")
# The folders in which every user can create files.
TEMPORARY = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
# All stacks of this machine or container share this folder, so that two of them never claim the same user id.
HOST = Path("/run/tidegate/model-users")
# The name of a file in a replica's folder. The file contains the user id that the replica's worker claimed.
NOTE = "model-user"
COUNT = 4096
# The first user ids of two ranges. The first range is far above the ids of accounts. The second one is for a
# container that has only 65,536 user ids.
FIRST = (2_000_000_000, 20_000)
END_LIMIT_S = 5.0
POLL_S = 0.005


class ModelUser:
    """A claimed user. The user's group id is the same number as the user id."""

    def __init__(self, uid: int, locks: Sequence[int]) -> None:
        self.uid = uid
        self._locks = locks

    @classmethod
    def claim(cls, *folders: Path) -> ModelUser:
        """Claim a user that no other worker has claimed.

        An earlier worker's model may have left processes of this user, and files in temporary folders. Kill
        these processes, and delete these files.

        ``folders``: in each of these folders, the user's file is locked. Raises Unavailable if no user can be
        claimed, or if a process does not end.
        """
        first = _first()
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            for uid in range(first, first + COUNT):
                locks = _locks(folder / str(uid) for folder in folders)
                if locks:
                    found = cls(uid, locks)
                    if os.pread(locks[0], 1, 0):
                        found.end_all()
                    else:
                        delete_files(uid)
                    return found
        except OSError as error:
            raise Unavailable(f"no user can be claimed for the model: {error}") from None
        raise Unavailable(f"all {COUNT} users for models are taken")

    def begin(self) -> None:
        """Record that the user has processes from now on."""
        os.pwrite(self._locks[0], b"used", 0)

    def end_all(self) -> None:
        """Kill every process of the user, and delete its temporary files.

        Raises Unavailable if a process does not end.
        """
        end_all(self.uid)
        os.ftruncate(self._locks[0], 0)

    def release(self) -> None:
        """Release the user for another worker."""
        for lock in self._locks:
            os.close(lock)
        self._locks = ()


def end_left(uid: int, folder: Path = HOST) -> None:
    """End the processes of a user whose worker has died, and delete the user's temporary files.

    Does nothing if a live worker has claimed the user.
    """
    if not is_ours(uid) or not (folder / str(uid)).exists():
        return
    for lock in _locks([folder / str(uid)]):
        try:
            end_all(uid)
        finally:
            os.close(lock)


def noted(state: Path) -> list[int]:
    """Return the user ids that the workers of this state folder have noted in their replicas' folders."""
    found = []
    for note in (state / "replicas").glob(f"*/{NOTE}"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(note.read_text()))
    return found


def is_ours(uid: int) -> bool:
    """Return True if a user id is in one of the ranges for models."""
    return any(first <= uid < first + COUNT for first in FIRST)


def end_all(uid: int) -> None:
    """Kill all processes of a user, and then delete its temporary files.

    Raises Unavailable if some processes still live after ``END_LIMIT_S``.
    """
    deadline = time.monotonic() + END_LIMIT_S
    while found := processes_of(uid):
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Unavailable(f"processes of the model's user {uid} do not end: {found[:8]}")
        time.sleep(POLL_S)
    delete_files(uid)


def delete_files(uid: int, folders: Iterable[Path] = TEMPORARY) -> None:
    """Delete a user's entries in temporary folders, as far as possible.

    Triton leaves an empty folder there for each start of its Python backend. It is deleted as well. When this
    function is called, the user must have no processes.
    """
    for folder in folders:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid != uid:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        Path(entry.path).unlink()


def processes_of(uid: int) -> list[int]:
    """Return the process ids of a user's live processes.

    The user is read from the status files, because the owner of the folder /proc/PID can be another user.
    """
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if _is_of(_status(entry.name), uid):
                    found.append(int(entry.name))
    return found


def _status(pid: str) -> bytes:
    # This is three times as fast as Path.read_text. There may be thousands of files.
    handle = os.open(f"{PROC}/{pid}/status", os.O_RDONLY)
    try:
        return os.read(handle, 4096)
    finally:
        os.close(handle)


def _is_of(status: bytes, uid: int) -> bool:
    uids = status.partition(b"\nUid:")[2].partition(b"\n")[0].split()
    state = status.partition(b"\nState:")[2].split(None, 1)[:1]
    return str(uid).encode() in uids and state != [b"Z"] and state != [b"X"]


def _locks(paths: Iterable[Path]) -> list[int]:
    """Lock all of these files, and return their file descriptors.

    If one of them is locked already, hold no lock and return an empty list.
    """
    held: list[int] = []
    for path in paths:
        held.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        try:
            fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            for each in held:
                os.close(each)
            return []
    return held


def _first() -> int:
    """Return the first user id of the range to use for models.

    The range is the first one of ``FIRST`` that lies completely in this process's user namespace. Raises
    Unavailable if there is none.
    """
    spans = [tuple(map(int, line.split())) for line in (PROC / "self/uid_map").read_text().splitlines()]
    for first in FIRST:
        if any(start <= first and first + COUNT <= start + count for start, _, count in spans):
            return first
    raise Unavailable("this container has too few user ids for a separate model user")
