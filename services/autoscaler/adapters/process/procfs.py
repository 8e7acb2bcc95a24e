"""Which processes belong to a replica, read from /proc.

The mark is ``TIDEGATE_REPLICA`` in a process's environment, which the worker hands on to everything it
starts. Two stacks on one machine may have replicas of the same name, so the mark alone is not enough:
the process must also lie in this stack: by its session or group, by the state folder in its environment,
or by the replica's folder as its working folder or in its command line.
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
    """A live process. ``started`` is the kernel's start tick: with the pid it names it for good."""

    pid: int
    group: int
    session: int
    started: int


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """A replica as its processes show it. ``leader`` is the worker's pid, 0 when not known."""

    replica: str
    folder: Path
    state_dir: Path
    leader: int = 0


def read(pid: int) -> Process | None:
    """The process, or None when it is gone or only a zombie."""
    try:
        raw = (PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    # The command's name stands in parentheses and may itself contain spaces and parentheses.
    fields = raw[raw.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[2]), int(fields[3]), int(fields[19]))


def mark_of(pid: int) -> tuple[str, str] | None:
    """The replica and the state folder in the environment of a process; None without a mark."""
    found = _environ(pid)
    return (found[MARK], found.get(SCOPE, "")) if MARK in found else None


def owned(owner: ReplicaIdentity) -> list[Process]:
    """Every live process of the replica: marked ones of this stack, and their leader's group."""
    everyone = [process for pid in _pids() if (process := read(pid)) is not None]
    marked = [p for p in everyone if _is_of(p, owner)]
    if not any(owner.leader in {p.pid, p.group, p.session} for p in marked) or not owner.leader:
        return marked
    # The group is the worker's own (it was started in a new session), so the unmarked in it are too.
    pids = {p.pid for p in marked}
    return marked + [p for p in everyone if p.group == owner.leader and p.pid not in pids]


def marked_in(state_dir: Path) -> set[str]:
    """The names of replicas that live processes of this state folder carry."""
    marks = (mark_of(pid) for pid in _pids())
    return {mark[0] for mark in marks if mark is not None and mark[1] == str(state_dir)}


def kill_all(owner: ReplicaIdentity, timeout_s: float) -> list[Process]:
    """SIGKILL every process of the replica until none is left; returns those that are after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while left := owned(owner):
        for process in left:
            send(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)
    return []


def send(process: Process, number: signal.Signals) -> bool:
    """Signal a process if it is still the same one; False when it is not there."""
    current = read(process.pid)
    if current is None or current.started != process.started:
        return False
    try:
        os.kill(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def memory_by_session() -> dict[int, int]:
    """The bytes of memory that the processes of each session take.

    What they share (libraries, files in memory) counts once, as much of it as one of them has.
    """
    own: dict[int, int] = {}
    shared: dict[int, int] = {}
    for pid in _pids():
        process, told = read(pid), _text(pid, "statm").split()
        if process is not None and len(told) > 2:
            resident, common = int(told[1]) * PAGE, int(told[2]) * PAGE
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
    return _stands_in(process.pid, owner.folder)


def _stands_in(pid: int, folder: Path) -> bool:
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
    except OSError:  # gone meanwhile, or another user's: not ours
        return ""


def _pids() -> Iterable[int]:
    return (int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
