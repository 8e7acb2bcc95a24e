"""Users of models: each has one holder, and nothing of a former holder is left.

All claims here are in the folder that the workers of this machine use: a claim ends the user's processes.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.autoscaler.adapters.process.replica_folder import SHARED_MEMORY, ReplicaFolder
from tests.conftest import PATIENCE_S
from tidegate.kernel import model_users
from tidegate.kernel.model_users import HOST, ModelUser
from tidegate.stack import shutdown

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(os.geteuid() != 0, reason="processes of other users are started by root only"),
]


@pytest.fixture
def user(tmp_path: Path) -> Iterator[ModelUser]:
    found = ModelUser.claim(HOST, tmp_path / "users")
    yield found
    found.release()
    model_users.end_left(found.uid)


def left_behind(uid: int) -> subprocess.Popen[bytes]:
    """Start a process of the user, without the stack's mark in its environment."""
    return subprocess.Popen(["sleep", "600"], user=uid, group=uid, extra_groups=[], env={})


def test_a_user_has_one_holder(user: ModelUser, tmp_path: Path) -> None:
    second = ModelUser.claim(HOST, tmp_path / "others")
    assert user.uid != second.uid
    second.release()
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / str(second.uid)).open("w") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        third = ModelUser.claim(HOST, tmp_path / "cache")
    assert third.uid != second.uid, "taken in one of the folders is taken"
    third.release()


def test_a_new_holder_ends_processes_of_the_previous_one() -> None:
    """The new holder may be a worker of another stack, which may be faster than this test."""
    first = ModelUser.claim(HOST)
    first.begin()
    process = left_behind(first.uid)
    ModelUser.claim(HOST).release()
    assert process.poll() is None
    first.release()
    second = ModelUser.claim(HOST)
    assert process.wait(PATIENCE_S) == -9
    second.release()


def test_a_new_holder_finds_no_file_of_the_previous_one(tmp_path: Path, open_folder: Path) -> None:
    first = ModelUser.claim(HOST)
    kept = tmp_path / "kept"
    kept.write_text("of another user")
    mine = [
        Path(folder) / f"tidegate-test-{os.urandom(4).hex()}" for folder in ("/tmp", "/var/tmp", "/dev/shm")
    ]
    for folder in mine:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "secret").write_text("of the first model")
        (folder / "link").symlink_to(kept.parent)
        os.chown(folder, first.uid, first.uid)
    link = Path(f"{mine[0]}-link")
    link.symlink_to(kept)
    os.chown(link, first.uid, first.uid, follow_symlinks=False)
    (open_folder / "result").touch()
    os.chown(open_folder / "result", first.uid, first.uid)
    first.release()
    # The next holder may be a worker of another stack, which may be faster than this test.
    ModelUser.claim(HOST).release()
    deadline = time.monotonic() + PATIENCE_S
    while any(map(os.path.lexists, [*mine, link])) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(os.path.lexists, [*mine, link]))
    assert kept.read_text() == "of another user"
    assert (open_folder / "result").exists(), "a folder of another user is not searched"


def test_a_sweep_ends_processes_that_a_model_left(user: ModelUser, tmp_path: Path) -> None:
    """Without CAP_SYS_PTRACE its mark cannot be read, and a model could remove the mark."""
    folder = tmp_path / "state" / "replicas" / "m-v1-0-1"
    folder.mkdir(parents=True)
    (folder / "model-user").write_text(str(user.uid))
    process = left_behind(user.uid)
    shutdown.sweep(tmp_path / "state")
    assert process.poll() is None, "its worker lives: it could be another stack's"
    user.release()
    shutdown.sweep(tmp_path / "state")
    assert process.wait(PATIENCE_S) == -9


def test_a_replicas_shared_memory_is_removed_with_its_folder(tmp_path: Path) -> None:
    region = SHARED_MEMORY / f"tidegate-{os.urandom(8).hex()}"
    (region / "deep").mkdir(parents=True)
    (region / "deep" / "x").touch()
    folder = ReplicaFolder(tmp_path / "replicas" / "m-v1-0-1")
    folder.path.mkdir(parents=True)
    (folder.path / "shared-memory").write_text(region.name)
    (folder.path / "model-user").write_text("2000000007")
    assert folder.model_user() == 2_000_000_007
    folder.remove()
    assert not region.exists()
    assert not folder.path.exists()


def test_no_other_user_is_ever_ended(tmp_path: Path) -> None:
    (tmp_path / "65534").touch()
    process = left_behind(65_534)
    model_users.end_left(65_534, tmp_path)
    assert process.poll() is None
    process.kill()
    process.wait()
