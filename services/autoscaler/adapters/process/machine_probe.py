"""Read this machine's cores, its memory, and how much of the memory is available now.

In a container, or under a limit of systemd, the lowest limit of this process's cgroups applies.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from services.autoscaler.domain.snapshot import Host

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
MIB = 1024 * 1024
# Available memory is rounded down to a multiple of this number of MiB. Otherwise each small change would add
# an entry to the recordings.
STEP_MB = 32


class MachineProbe:
    """A :class:`HostProbe` of the machine that this process runs on."""

    def __init__(self, proc: Path = PROC, cgroup: Path = CGROUP) -> None:
        self._proc = proc
        self._cgroup = cgroup

    async def read(self) -> Host | None:
        """Return the resources of the machine; None if /proc cannot be read."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> Host | None:
        try:
            found = dict(line.split(":", 1) for line in (self._proc / "meminfo").read_text().splitlines())
            total, available = (int(found[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        except (OSError, KeyError, ValueError):
            return None
        for limit, used in self._memory_limits():
            if limit < total:
                total, available = limit, min(available, max(0, limit - used))
        cores = min([float(len(os.sched_getaffinity(0))), *self._core_limits()])
        return Host(cores, total // MIB, available // MIB // STEP_MB * STEP_MB)

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        """Yield the memory limit and the used memory of this process's cgroup and of each parent cgroup.

        Both are in bytes. The used memory does not include cached files.
        """
        for folder in self._above("", ""):
            limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            if limit is not None and used is not None:
                yield limit, used - _statistic(folder, "inactive_file")
        for folder in self._above("memory", "memory"):
            limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
            if limit is not None and used is not None:
                yield limit, used - _statistic(folder, "total_inactive_file")

    def _core_limits(self) -> Iterator[float]:
        for folder in self._above("", ""):
            quota, _, period = _text(folder / "cpu.max").partition(" ")
            if quota.isdecimal() and period.isdecimal():
                yield int(quota) / int(period)
        for folder in self._above("cpu", "cpu"):
            limit, each = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if limit and each and limit > 0:
                yield limit / each

    def _above(self, controller: str, mounted: str) -> Iterator[Path]:
        """Yield the folder of this process's cgroup, and the folders of its parent cgroups.

        ``controller``: the controller in version 1 of cgroups; empty for version 2. ``mounted``: the folder
        below the cgroup root at which this controller is mounted; empty for the root itself.
        """
        root = self._cgroup / mounted
        for line in _text(self._proc / "self" / "cgroup").splitlines():
            _, names, path = [*line.split(":", 2), "", ""][:3]
            if controller in names.split(","):
                # In a container, `path` may be a path of the host that does not exist in the container. Then
                # only the root folder can be read.
                folder = root / path.lstrip("/")
                yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root))
                return


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _statistic(folder: Path, name: str) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0
