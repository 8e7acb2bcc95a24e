"""Find and end processes through /proc. A pid can be reused, so pid and start time identify a process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidegate.stack.child import MARK, REPLICA

PROC = Path("/proc")
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Process:
    """A process: its pid, and the time of its start in clock ticks after boot."""

    pid: int
    started: int

    def alive(self) -> bool:
        """Return True if this process runs, False if it has ended or is a zombie."""
        return find(self.pid) == self

    def command(self, limit: int | None = 120) -> str:
        """Return the command line, cut to ``limit`` characters; empty for an ended or a kernel process."""
        with contextlib.suppress(OSError):
            words = (PROC / str(self.pid) / "cmdline").read_bytes().split(b"\0")
            return b" ".join(words).decode(errors="replace").strip()[:limit]
        return ""

    def environment(self) -> dict[str, str]:
        """Return the initial environment; empty for an ended process, or for a process of another user."""
        with contextlib.suppress(OSError):
            items = (PROC / str(self.pid) / "environ").read_bytes().decode(errors="replace").split("\0")
            return dict(item.split("=", 1) for item in items if "=" in item)
        return {}

    def handles(self, number: signal.Signals) -> bool:
        """Return True if the process handles this signal itself, so that the signal does not end it."""
        with contextlib.suppress(OSError):
            for line in (PROC / str(self.pid) / "status").read_text().splitlines():
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) & 1 << (number - 1))
        return False

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process. Ignore a process that has ended.

        ``group``: True to send the signal to the whole process group if the process leads one.
        """
        if not self.alive():
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)


def find(pid: int) -> Process | None:
    """Return the process that has this pid now, or None."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The program's name, in parentheses, may itself contain spaces and parentheses. So count the fields after
    # the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else Process(pid, int(fields[19]))


def marked(state: Path) -> list[Process]:
    """Return every process that belongs to the stack of this state folder, except the calling process."""
    own = os.getpid()
    found = (find(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return [p for p in found if p and p.pid != own and _belongs(p, state)]


def _belongs(process: Process, state: Path) -> bool:
    environment = process.environment()
    # The environment of a model server lacks the stack's mark, but has the variable REPLICA. Its command line
    # names the replica's folder, which is in the state folder.
    of_replica = REPLICA in environment and f"{state}/" in process.command(limit=None)
    return environment.get(MARK) == str(state) or of_replica


def wait_gone(processes: Iterable[Process], limit_s: float) -> list[Process]:
    """Wait until the processes have ended. Return those that still run after ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    left = [p for p in processes if p.alive()]
    while left and time.monotonic() < end:
        time.sleep(POLL_S)
        left = [p for p in left if p.alive()]
    return left


def stop(processes: Sequence[Process], grace_s: float) -> None:
    """Send SIGTERM to each process. After ``grace_s`` seconds, kill those that still run.

    If such a process leads a process group, kill the whole group.
    """
    for process in processes:
        process.send(signal.SIGTERM)
    left = wait_gone(processes, grace_s)
    for process in left:
        process.send(signal.SIGKILL, group=True)
    wait_gone(left, 5.0)


def kill_group(group: int) -> None:
    """Send SIGKILL to every process of a group whose leader has ended. Ignore an empty group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
