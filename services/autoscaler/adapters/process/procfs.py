"""Find the processes of a replica in /proc.

The worker has the environment variable ``TIDEGATE_REPLICA``, and all its children inherit it. This variable
marks the replica's processes.

Another stack on the same machine may have a replica of the same name. So a process with the mark must also
meet at least one of these conditions:

- It is the worker, or it is in the worker's session or process group.
- Its environment names the state folder of this stack.
- Its command line contains the path of the replica's folder.
- Its working directory is in the replica's folder.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MARK = "TIDEGATE_REPLICA"
SCOPE = "TIDEGATE_STATE_DIR"
POLL_S = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """A live process. ``started`` is its start time in ticks. Pid and start time together are unique."""

    pid: int
    group: int
    session: int
    started: int


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """The values that identify the processes of a replica. ``leader`` is the worker's pid; 0 if not known."""

    replica: str
    folder: Path
    state_dir: Path
    leader: int = 0


def read(pid: int) -> Process | None:
    """Return a process; None if it has ended or is a zombie."""
    try:
        raw = (PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    # The command name is in parentheses, and may itself contain spaces and parentheses.
    fields = raw[raw.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[2]), int(fields[3]), int(fields[19]))


def mark_of(pid: int) -> tuple[str, str] | None:
    """Return the replica and state folder in a process's environment; None if it names no replica."""
    found = _environ(pid)
    return (found[MARK], found.get(SCOPE, "")) if MARK in found else None


def processes_of(owner: ReplicaIdentity) -> list[Process]:
    """Return every live process of a replica.

    These are the processes that meet the conditions in the docstring of this module, and all other processes
    of the worker's process group.
    """
    everyone = [process for pid in _pids() if (process := read(pid)) is not None]
    marked = [p for p in everyone if _is_of(p, owner)]
    if not any(owner.leader in {p.pid, p.group, p.session} for p in marked) or not owner.leader:
        return marked
    # The worker started in a new session. So unmarked processes in the worker's process group also belong to
    # the worker.
    pids = {p.pid for p in marked}
    return marked + [p for p in everyone if p.group == owner.leader and p.pid not in pids]


def marked_in(state_dir: Path) -> set[str]:
    """Return the replicas of this state folder that have live processes."""
    marks = (mark_of(pid) for pid in _pids())
    return {mark[0] for mark in marks if mark is not None and mark[1] == str(state_dir)}


def kill_all(owner: ReplicaIdentity, timeout_s: float) -> list[Process]:
    """Kill every process of the replica, and return those that still live after ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while left := processes_of(owner):
        for process in left:
            send(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)
    return []


def send(process: Process, number: signal.Signals) -> bool:
    """Send a signal to this process. Return False if the signal was not sent.

    If a later process has the same pid, it does not get the signal.
    """
    current = read(process.pid)
    if current is None or current.started != process.started:
        return False
    try:
        os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def memory_by_session() -> dict[int, int]:
    """Return how many bytes of memory the processes of each session use together.

    Shared memory (libraries, files in memory) is counted for only one process of a session: the process that
    has the most.
    """
    own: dict[int, int] = {}
    shared: dict[int, int] = {}
    for pid in _pids():
        process, sizes = read(pid), _text(pid, "statm").split()
        if process is not None and len(sizes) > 2:
            resident, common = int(sizes[1]) * PAGE, int(sizes[2]) * PAGE
            own[process.session] = own.get(process.session, 0) + resident - common
            shared[process.session] = max(shared.get(process.session, 0), common)
    return {session: size + shared[session] for session, size in own.items()}


def _is_of(process: Process, owner: ReplicaIdentity) -> bool:
    mark = mark_of(process.pid)
    if mark is None or mark[0] != owner.replica:
        return False
    if owner.leader and owner.leader in {process.pid, process.group, process.session}:
        return True
    if mark[1] == str(owner.state_dir) or str(owner.folder) in _text(process.pid, "cmdline"):
        return True
    return _works_in(process.pid, owner.folder)


def _works_in(pid: int, folder: Path) -> bool:
    try:
        return (PROC / str(pid) / "cwd").readlink().is_relative_to(folder)
    except OSError:
        return False


def _environ(pid: int) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in _text(pid, "environ").split("\0"))
    return {key: value for key, _, value in pairs if key in {MARK, SCOPE}}


def _text(pid: int, name: str) -> str:
    try:
        return (PROC / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:  # the process has ended, or belongs to another user
        return ""


def _pids() -> Iterable[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
