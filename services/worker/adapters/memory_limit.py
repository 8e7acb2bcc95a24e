"""Limit a model's memory, and find out if one of its processes was killed because memory ran out.

In a container, the container engine sets the limit. Without a container, the worker limits Triton and its
child processes by a cgroup. If it cannot create a cgroup, it measures the memory of these processes. If they
together use more than the limit, it kills the largest one. Resource limits (``setrlimit``) are not exact
enough. RLIMIT_AS limits address space, and Triton and CUDA reserve much more address space than they use.
RLIMIT_DATA limits each process separately, but the limit is for all processes together.
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
# These files of cgroup v2 and v1 contain the number of processes that the kernel has killed. Only the first
# file that exists is read.
COUNTERS = ("memory.events", "memory.oom_control", "memory/memory.oom_control")
OUT_OF_MEMORY = "The kernel killed a process (out of memory): this container reached its memory limit."
# Two files in a replica's folder. The launcher writes the limit in MiB to the first. The worker writes the
# path of the replica's cgroup to the second.
LIMIT_FILE, GROUP_FILE = "memory-limit", "memory-group"
LOOK_EVERY_S = 0.2
LEAVE_S = 2.0
MIB = 1024 * 1024


def kills(cgroup: Path = CGROUP) -> int:
    """Return how many processes the kernel has killed because memory ran out; 0 if that is not known."""
    for name in COUNTERS:
        try:
            found = re.search(r"^oom_kill (\d+)$", (cgroup / name).read_text(), re.MULTILINE)
        except OSError:
            continue
        return int(found[1]) if found else 0
    return 0


def read_limit(folder: Path, name: str) -> MemoryLimit | None:
    """Return the memory limit of the replica in ``folder``; None if there is none.

    ``name``: the name for the replica's cgroup.
    """
    try:
        limit_mb = int((folder / LIMIT_FILE).read_text())
    except (OSError, ValueError):
        return None
    return MemoryLimit(limit_mb, name, folder / GROUP_FILE)


class MemoryLimit:
    """The memory limit of one Triton, in MiB.

    ``name``: the name of the cgroup for this Triton; it begins with "tidegate-". ``note``: the file to which
    the cgroup's path is written, so that the launcher can remove the cgroup later.
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
        """Return the limit and the way in which it is enforced, as a text for the replica's report."""
        watched = f"watched by the worker, because no cgroup can be created: {self._why}"
        return f"{self.limit_mb} MiB, {watched if self._why else 'by a cgroup'}"

    @property
    def message(self) -> str:
        """Return the message for a process that was killed because of the limit."""
        return f"A process was killed (out of memory): the model reached its limit of {self.limit_mb} MiB."

    @property
    def kills(self) -> int:
        """Return how many processes were killed because the limit was reached."""
        return self._kills + (kills(self.group) if self.group is not None else 0)

    def open(self) -> None:
        """Create the cgroup for a Triton that is about to start, if possible."""
        if self.group is None and not self._why:
            self.group, self._why = _create_group(self._name, self.limit_mb * MIB, self._cgroup, self._proc)
            if self.group is not None:
                self._note.write_text(str(self.group))
            else:
                log.warning(
                    "memory is watched by the worker, not limited by the kernel", extra={"why": self._why}
                )

    def watch(self, processes: Callable[[], Iterable[int]]) -> None:
        """Start to watch the memory of the model's processes, unless a cgroup limits it.

        ``processes``: a function that returns the pids of the processes. If they together use more than the
        limit, the largest one is killed.
        """
        if self.group is None and self._watching is None:
            self._watching = asyncio.create_task(self._watch(processes))

    async def close(self) -> None:
        """Stop watching, and remove the cgroup when its processes have ended.

        If the cgroup still has processes after LEAVE_S seconds, it is not removed.
        """
        watching, self._watching = self._watching, None
        await tasks.end(watching)
        if self.group is not None:
            found = kills(self.group)
            # Only an empty cgroup can be removed, and killed processes need a moment to leave it. If it stays
            # in use, the next start of Triton reuses it, or the launcher removes it.
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
        used = {pid: _used_bytes(self._proc / str(pid)) for pid in pids}
        if sum(used.values()) <= self.limit_mb * MIB:
            return
        # Kill the largest process, as the kernel would.
        largest = max(used, key=lambda pid: used[pid])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Count before the kill, because the worker reads the count as soon as the process ends.
            self._kills += 1
            os.kill(largest, signal.SIGKILL)
            log.error("killed, out of memory", extra={"pid": largest, "limit_mb": self.limit_mb})


def _create_group(name: str, limit: int, cgroup: Path, proc: Path) -> tuple[Path | None, str]:
    """Create a cgroup with this limit. Return the cgroup and an error text.

    The error text is empty if the cgroup was created. Otherwise, None is returned in place of the cgroup.
    """
    why = "no memory controller is mounted"
    for parent in _parents(cgroup, proc):
        group = parent / name
        try:
            if (parent / "cgroup.controllers").exists():
                _enable_children(parent)
            group.mkdir(exist_ok=True)
            _set_limit(group, limit)
        except OSError as error:
            why = f"{error.strerror} ({error.filename})"
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group, ""
    return None, why


def _set_limit(group: Path, limit: int) -> None:
    # Forbid swap, because a model that swaps is so slow that ending it is better.
    for name, swap, most in (
        ("memory.max", "memory.swap.max", 0),
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit),
    ):
        if (group / name).exists():
            (group / name).write_text(str(limit))
            with contextlib.suppress(OSError):  # not every kernel can limit swap
                if (group / swap).exists():
                    (group / swap).write_text(str(most))
            return
    raise FileNotFoundError(2, "no memory controller", str(group))


def _enable_children(parent: Path) -> None:
    """Enable memory limits for the children of a cgroup v2."""
    enabled = (parent / "cgroup.subtree_control").read_text().split()
    if "memory" not in enabled:
        (parent / "cgroup.subtree_control").write_text("+memory")


def _parents(cgroup: Path, proc: Path) -> Iterator[Path]:
    """Yield the cgroups in which the model's cgroup may be created.

    The first is the cgroup of this process. In cgroup v1, it is the only one. In cgroup v2, a cgroup that
    contains processes cannot have children with limits. So the parents follow, up to the first one that has a
    limit. The model's cgroup must be inside that one, because its limit must apply to the model too.
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


def _used_bytes(process: Path) -> int:
    """Return how many bytes of memory and swap a process uses.

    Pages of files are not counted, because the kernel can reclaim them.
    """
    found = re.findall(r"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", _text(process / "status"), re.MULTILINE)
    return sum(map(int, found)) * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
