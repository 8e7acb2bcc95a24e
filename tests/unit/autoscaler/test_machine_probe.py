"""Test reading the resources of a machine from files of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.autoscaler.adapters.process.machine_probe import MachineProbe

MEMINFO = "MemTotal:       16384000 kB\nMemFree:  1000 kB\nMemAvailable:    8192000 kB\n"
MIB = 1024 * 1024


@pytest.fixture
def machine(tmp_path: Path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)

    def look(groups: str = "", files: dict[str, str] | None = None) -> MachineProbe:
        (proc / "self" / "cgroup").write_text(groups)
        for name, text in (files or {}).items():
            path = cgroup / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return MachineProbe(proc, cgroup)

    return look


async def test_a_machine_without_limits(machine):
    found = await machine("0::/\n").read()
    assert (found.memory_mb, found.available_mb) == (16_000, 8_000)
    assert found.cores >= 1


async def test_the_tightest_limit_of_version_2_counts(machine):
    files = {
        "user/memory.max": f"{2_000 * MIB}\n",
        "user/memory.current": f"{1_500 * MIB}\n",
        "user/memory.stat": f"anon 1\ninactive_file {500 * MIB}\n",
        "user/cpu.max": "50000 100000\n",
        "user/app/memory.max": "max\n",
        "user/app/memory.current": "1\n",
        "user/app/cpu.max": "max 100000\n",
    }
    found = await machine("0::/user/app\n", files).read()
    assert (found.cores, found.memory_mb, found.available_mb) == (0.5, 2_000, 992)


async def test_the_limit_of_version_1_counts(machine):
    files = {
        "memory/box/memory.limit_in_bytes": f"{1_024 * MIB}\n",
        "memory/box/memory.usage_in_bytes": f"{512 * MIB}\n",
        "memory/box/memory.stat": "total_inactive_file 0\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "1\n",
        "cpu/box/cpu.cfs_quota_us": "150000\n",
        "cpu/box/cpu.cfs_period_us": "100000\n",
    }
    found = await machine("4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n", files).read()
    assert (found.memory_mb, found.available_mb) == (1_024, 512)
    assert found.cores <= 1.5


async def test_what_cannot_be_read_is_not_known(tmp_path):
    assert await MachineProbe(tmp_path, tmp_path).read() is None
