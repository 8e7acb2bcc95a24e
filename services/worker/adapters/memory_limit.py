"""Hold the processes of a model to a memory limit, and notice when one is killed, out of memory.

A container is held to its limit by its engine. A worker that is a process of the machine does it itself, for
Triton and what Triton starts: by a cgroup of their own where one can be made, else by a watch over what they
take. Resource limits are no way: RLIMIT_AS counts address space, of which Triton and CUDA reserve many times
what they use, and RLIMIT_DATA holds for each process alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tidegate.kernel import tasks, telemetry

log = telemetry.logger(__name__)

CGROUP, PROC = Path("/sys/fs/cgroup"), Path("/proc")
# cgroup v2, and v1; the first that is there.
COUNTERS = ("memory.events", "memory.oom_control", "memory/memory.oom_control")
OUT_OF_MEMORY = "The kernel killed a process here, out of memory: the limit of this container was reached."
# Below a replica's folder: the limit in MiB as the launcher wants it, and the cgroup that was made for it.
LIMIT_FILE, GROUP_FILE = "memory-limit", "memory-group"
LOOK_EVERY_S = 0.2
LEAVE_S = 2.0
MIB = 1024 * 1024


def kills(cgroup: Path = CGROUP) -> int:
    """How many processes the kernel has ended so far; 0 where nobody counts."""
    for name in COUNTERS:
        try:
            found = re.search(r"^oom_kill (\d+)$", (cgroup / name).read_text(), re.MULTILINE)
        except OSError:
            continue
        return int(found[1]) if found else 0
    return 0


def read_limit(folder: Path, name: str) -> MemoryLimit | None:
    """Return the limit of the replica in ``folder``, named ``name``; None: its launcher wants none here."""
    try:
        wanted = int((folder / LIMIT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return MemoryLimit(wanted, name, folder / GROUP_FILE)


class MemoryLimit:
    """The limit of one Triton, of ``limit_mb`` MiB.

    ``name`` is that of the cgroup, and begins with "tidegate-". ``note`` gets its path, for the launcher.
    """

    def __init__(
        self, limit_mb: int, name: str, note: Path, cgroup: Path = CGROUP, proc: Path = PROC
    ) -> None:
        self.limit_mb = limit_mb
        self._name = name
        self._note = note
        self._cgroup = cgroup
        self._proc = proc
        self._watching: asyncio.Task[None] | None = None
        self._kills = 0
        self._why = ""
        self.group: Path | None = None

    @property
    def description(self) -> str:
        """Return the limit in words, for the replica's report."""
        by = f"watched, as no cgroup can be made: {self._why}" if self._why else "by a cgroup"
        return f"{self.limit_mb} MiB, {by}"

    @property
    def message(self) -> str:
        """Return the message for a process that was killed because of the limit."""
        return f"A process was killed, out of memory: the model reached its limit of {self.limit_mb} MiB."

    @property
    def kills(self) -> int:
        """Return how many processes were ended so far because the limit was reached."""
        return self._kills + (kills(self.group) if self.group is not None else 0)

    def open(self) -> None:
        """Make the cgroup, if one can be made, for a Triton that is to start."""
        if self.group is None and not self._why:
            self.group, self._why = _made(self._name, self.limit_mb * MIB, self._cgroup, self._proc)
            if self.group is not None:
                self._note.write_text(str(self.group))
            else:
                log.warning("memory is watched, not limited by the kernel", extra={"why": self._why})

    def watch(self, processes: Callable[[], Iterable[int]]) -> None:
        """Watch these processes, the server first, where the kernel does not."""
        if self.group is None and self._watching is None:
            self._watching = asyncio.create_task(self._watch(processes))

    async def close(self) -> None:
        """Watch no more, and take the cgroup away, if its processes have ended."""
        watching, self._watching = self._watching, None
        await tasks.end(watching)
        if self.group is not None:
            found = kills(self.group)
            # Processes that were killed leave it a moment later. One that stays busy is used again by the
            # next start, or taken away by the launcher.
            until = time.monotonic() + LEAVE_S
            while self.group is not None:
                try:
                    self.group.rmdir()
                except OSError:
                    if time.monotonic() > until:
                        return
                    await asyncio.sleep(0.02)
                else:
                    self._kills, self.group = self._kills + found, None

    async def _watch(self, processes: Callable[[], Iterable[int]]) -> None:
        while True:
            self._look(list(processes()))
            await asyncio.sleep(LOOK_EVERY_S)

    def _look(self, pids: list[int]) -> None:
        taken = {pid: _taken(self._proc / str(pid)) for pid in pids}
        if sum(taken.values()) <= self.limit_mb * MIB:
            return
        # As the kernel chooses: the largest.
        largest = max(taken, key=lambda pid: taken[pid])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Counted first: whoever sees the end asks for the reason at once.
            self._kills += 1
            os.kill(largest, signal.SIGKILL)
            log.error("killed, out of memory", extra={"pid": largest, "limit_mb": self.limit_mb})


def _made(name: str, limit: int, cgroup: Path, proc: Path) -> tuple[Path | None, str]:
    """Make a cgroup with this limit; None and why where that is not possible."""
    why = "no memory controller is mounted"
    for parent in _parents(cgroup, proc):
        group = parent / name
        try:
            if (parent / "cgroup.controllers").exists():
                _hand_down(parent)
            group.mkdir(exist_ok=True)
            _set(group, limit)
        except OSError as error:
            why = f"{error.strerror} ({error.filename})"
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group, ""
    return None, why


def _set(group: Path, limit: int) -> None:
    # No swap on top: a model that swaps is worse than one that ends.
    for name, swap, most in (
        ("memory.max", "memory.swap.max", 0),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit),
    ):
        if (group / name).exists():
            (group / name).write_text(str(limit))
            with contextlib.suppress(OSError):  # not every kernel counts swap
                if (group / swap).exists():
                    (group / swap).write_text(str(most))
            return
    raise FileNotFoundError(2, "no memory controller", str(group))


def _hand_down(parent: Path) -> None:
    """Let the children of a cgroup of version 2 have memory limits."""
    handed = (parent / "cgroup.subtree_control").read_text().split()
    if "memory" not in handed:
        (parent / "cgroup.subtree_control").write_text("+memory")


def _parents(cgroup: Path, proc: Path) -> Iterator[Path]:
    """Where a cgroup may be made: below this process's, else further up as long as that escapes no limit.

    In version 2 one that has processes has no children with limits, so it is mostly further up.
    """
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory" or "memory" in controllers.split(","):
            root = cgroup / "memory"
        elif controllers == "":
            root = cgroup
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents) if own.is_dir() else (root,):
            if not folder.is_relative_to(root):
                break
            if folder.is_dir():
                yield folder
            if _text(folder / "memory.max") not in {"", "max"} or root.name == "memory":
                break


def _taken(process: Path) -> int:
    """The bytes that a process has in memory or swapped out, without what is in a file as well."""
    found = re.findall(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", _text(process / "status"), re.MULTILINE)
    return sum(map(int, found)) * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
