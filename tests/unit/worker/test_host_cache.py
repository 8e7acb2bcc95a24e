"""The cache of a host: the longest unused entries go first, and what a worker uses stays."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from services.worker.adapters import host_cache
from services.worker.adapters.file_lock import try_exclusive
from services.worker.adapters.host_cache import HostCache

Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Add an artifact (or an environment) of this size that was used at this time."""

    def make(digit: str, size: int, used_at: float, *, environment: bool = False) -> Path:
        folder = tmp_path / "envs" if environment else tmp_path
        path = folder / (digit * 64)
        if environment:
            (path / "bin").mkdir(parents=True)
            (path / "bin" / "python3").write_bytes(bytes(size))
            path.with_suffix(".ok").write_text(json.dumps({"bytes": size}))
        else:
            path.write_bytes(bytes(size))
            path.with_suffix(".ok").touch()
        path.with_suffix(".use").touch()
        os.utime(path.with_suffix(".use"), (used_at, used_at))
        return path

    return make


def test_the_longest_unused_entries_go_first_until_there_is_room(tmp_path, put):
    old, older = put("a", 100, 30), put("b", 100, 10)
    new, environment = put("c", 100, 40), put("d", 100, 20, environment=True)
    HostCache(tmp_path, max_bytes=400).make_room()
    assert all(path.exists() for path in (old, older, new, environment)), "the cache is not too large"
    HostCache(tmp_path, max_bytes=400).make_room(150)
    assert [path.exists() for path in (older, environment, old, new)] == [False, False, True, True]
    assert not older.with_suffix(".ok").exists()
    assert not environment.with_suffix(".ok").exists()


def test_without_a_limit_only_the_disk_counts(tmp_path, put, monkeypatch):
    entry = put("a", 100, 10)
    HostCache(tmp_path).make_room(10**6)
    assert entry.exists()
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(1000, 500, 500))
    HostCache(tmp_path, min_free_bytes=400).make_room(100)
    assert entry.exists()
    HostCache(tmp_path, min_free_bytes=400).make_room(101)
    assert not entry.exists()


def test_if_something_else_fills_the_disk_nothing_is_deleted(tmp_path, put, monkeypatch, caplog):
    """Otherwise each start would delete the environments of other models, and the disk would stay full."""
    entries = [put("a", 100, 10), put("b", 100, 20)]
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(1000, 900, 100))
    HostCache(tmp_path, min_free_bytes=400).make_room()
    assert all(entry.exists() for entry in entries)
    assert "too little room" in caplog.text


def test_a_deletion_counts_for_one_worker(tmp_path, put):
    entry = host_cache.Entry(put("a", 100, 10), 100, 10)
    assert host_cache._delete(entry)
    assert not host_cache._delete(entry)


def test_what_is_in_use_stays_and_is_used_again_now(tmp_path, put, caplog):
    used, unused = put("a", 100, 10), put("b", 100, 20)
    cache = HostCache(tmp_path, max_bytes=50)
    cache.use(used)
    os.utime(used.with_suffix(".use"), (10, 10))
    with caplog.at_level("WARNING", host_cache.__name__):
        HostCache(tmp_path, max_bytes=50).make_room()
    assert (used.exists(), unused.exists()) == (True, False)
    assert used.with_suffix(".use").stat().st_mtime > 20
    assert "too little room" in caplog.text
    cache.close()
    HostCache(tmp_path, max_bytes=50).make_room()
    assert not used.exists()


def test_an_entry_that_is_being_prepared_stays(tmp_path, put):
    entry = put("a", 100, 10)
    with try_exclusive(entry.with_suffix(".lock")) as locked:
        assert locked
        HostCache(tmp_path, max_bytes=50).make_room()
    assert entry.exists()


def test_a_killed_worker_holds_nothing(tmp_path, put):
    entry = put("a", 100, 10)
    script = (
        "import sys; from pathlib import Path; from services.worker.adapters.host_cache import HostCache;"
        "cache = HostCache(Path(sys.argv[1])); cache.use(Path(sys.argv[2])); print('using', flush=True);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(entry)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"using\n"
        HostCache(tmp_path, max_bytes=50).make_room()
        assert entry.exists()
        worker.kill()
    HostCache(tmp_path, max_bytes=50).make_room()
    assert not entry.exists()


def test_entries_of_an_older_release_count_as_used_when_they_were_made(tmp_path, put):
    older, newer, environment = put("a", 100, 0), put("b", 100, 0), put("c", 4096, 20, environment=True)
    for at, path in enumerate((older, newer), start=1):
        path.with_suffix(".use").unlink()
        os.utime(path.with_suffix(".ok"), (at * 10, at * 10))
    environment.with_suffix(".ok").write_text("")
    HostCache(tmp_path, max_bytes=4096 + 150).make_room()
    assert (older.exists(), newer.exists(), environment.exists()) == (False, True, True)
    assert json.loads(environment.with_suffix(".ok").read_text()) == {"bytes": 4096}


def test_what_cannot_be_deleted_or_locked_does_not_stop_a_start(tmp_path, put, caplog):
    stuck, foreign, other = put("a", 100, 10), put("b", 100, 20), put("c", 100, 30)
    stuck.unlink()
    stuck.mkdir()
    stuck.with_suffix(".ok").unlink()
    stuck.with_suffix(".ok").mkdir()
    foreign.with_suffix(".lock").mkdir()
    part = stuck.with_suffix(".part")
    part.write_bytes(bytes(100))
    cache = HostCache(tmp_path, max_bytes=150)
    with caplog.at_level("WARNING", host_cache.__name__):
        cache.make_room()
        used = put("d", 100, 40)
        used.with_suffix(".use").unlink()
        used.with_suffix(".use").mkdir()
        cache.use(used)
    assert not other.exists(), "the next one is deleted instead"
    assert foreign.exists()
    assert "cannot be deleted" in caplog.text
    assert "not protected" in caplog.text


def test_the_home_of_a_killed_build_is_deleted_too(tmp_path, put):
    environment = put("a", 100, 10, environment=True)
    home = environment.with_suffix(".home")
    home.mkdir()
    (home / "pip").write_bytes(bytes(8192))
    shutil.rmtree(environment)
    HostCache(tmp_path, max_bytes=8000).make_room()
    assert not home.exists()


def test_half_a_download_and_a_build_that_failed_count(tmp_path, put):
    whole = put("a", 100, 20)
    part = tmp_path / ("b" * 64 + ".part")
    part.write_bytes(bytes(100))
    part.with_suffix(".use").touch()
    os.utime(part.with_suffix(".use"), (10, 10))
    failed = put("c", 100, 15, environment=True)
    failed.with_suffix(".ok").unlink()
    HostCache(tmp_path, max_bytes=150).make_room()
    assert (part.exists(), failed.exists(), whole.exists()) == (False, False, True)


def test_other_files_of_the_cache_are_left_alone(tmp_path, put):
    put("a", 100, 10)
    other = tmp_path / "artifact"
    other.write_bytes(bytes(100))
    HostCache(tmp_path, max_bytes=1).make_room()
    assert other.exists()
