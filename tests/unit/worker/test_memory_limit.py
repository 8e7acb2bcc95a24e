"""Counts of killed processes in both versions of cgroups, and the place of a model's cgroup."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.worker.adapters import memory_limit
from services.worker.adapters.memory_limit import MemoryLimit, kills, read_limit


def test_both_kinds_of_cgroup_and_none(tmp_path):
    assert kills(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert kills(tmp_path) == 2
    assert kills(tmp_path / "memory") == 2
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n")
    assert kills(tmp_path) == 3
    (tmp_path / "memory.events").write_text("low 0\n")
    assert kills(tmp_path) == 0


def test_only_a_replica_whose_launcher_wants_a_limit_has_one(tmp_path):
    assert read_limit(tmp_path, "tidegate-x") is None
    (tmp_path / memory_limit.LIMIT_FILE).write_text("512")
    found = read_limit(tmp_path, "tidegate-x")
    assert found is not None
    assert found.limit_mb == 512


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A folder like a hierarchy of version 2: a new group gets the files that its parent enables."""
    real = Path.mkdir

    def mkdir(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if (
            self.name.startswith("tidegate-")
            and "memory" in (self.parent / "cgroup.subtree_control").read_text()
        ):
            for name in ("memory.max", "memory.swap.max"):
                (self / name).write_text("max")

    def write(self, text, *args, **kwargs):
        if self.name == "cgroup.subtree_control" and (self.parent / "cgroup.procs").read_text().strip():
            raise OSError(16, "Device or resource busy", str(self))
        return wrote(self, text, *args, **kwargs)

    def group(path: str, *, procs: str = "", handed: str = "", limit: str = "max") -> Path:
        folder = tmp_path / "cgroup" / path
        real(folder, parents=True, exist_ok=True)
        for name, text in (
            ("cgroup.controllers", "memory"),
            ("cgroup.subtree_control", handed),
            ("cgroup.procs", procs),
            ("memory.max", limit),
        ):
            wrote(folder / name, text)
        return folder

    wrote = Path.write_text
    group("", handed="memory")
    (tmp_path / "cgroup" / "memory.max").unlink()
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/user/app\n")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "write_text", write)
    return group


def opened(tmp_path: Path) -> MemoryLimit:
    limit = MemoryLimit(512, "tidegate-x", tmp_path / "note", tmp_path / "cgroup", tmp_path)
    limit.open()
    return limit


def test_below_a_group_without_processes(kernel, tmp_path):
    own = kernel("user/app")
    kernel("user")
    found = opened(tmp_path)
    assert found.group == own / "tidegate-x"
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    assert found.group is not None
    assert (found.group / "memory.max").read_text() == str(512 * 2**20)
    assert (found.group / "memory.swap.max").read_text() == "0"
    assert (tmp_path / "note").read_text() == str(found.group)
    assert found.description == "512 MiB, by a cgroup"


def test_beside_a_group_with_processes_but_never_outside_of_its_limit(kernel, tmp_path):
    kernel("user/app", procs="7")
    beside = kernel("user", handed="memory")
    assert opened(tmp_path).group == beside / "tidegate-x"
    (beside / "tidegate-x" / "memory.max").unlink()
    kernel("user/app", procs="7", limit="1000000")
    found = opened(tmp_path)
    assert found.group is None
    why = "no cgroup can be created: Device or resource busy"
    assert found.description.startswith(f"512 MiB, watched by the worker, because {why}")
