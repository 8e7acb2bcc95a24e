"""The content of a backup and the paths of a restore, with the files of a stopped stack."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tidegate.kernel.settings.base import Settings
from tidegate.stack import databases
from tidegate.stack.backup import backup
from tidegate.stack.backup_file import BackupError, Manifest, written
from tidegate.stack.restore import restore

DIGEST = "ab" * 32


def settings_in(state: Path, **fields: str) -> Settings:
    return Settings(state_dir=state, **fields)  # type: ignore[arg-type]  # mypy sees only one type of the fields


def fill(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def registry(path: Path, *digests: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            "PRAGMA journal_mode=WAL; CREATE TABLE alembic_version (version_num);"
            "INSERT INTO alembic_version VALUES ('0003'); CREATE TABLE versions (artifact_sha256);"
        )
        db.executemany("INSERT INTO versions VALUES (?)", [(digest,) for digest in digests])
        db.commit()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    state = tmp_path / "state"
    registry(state / "data" / "registry.db", DIGEST)
    registry(state / "data" / "history.db")
    for name, text in {
        "token": "secret",
        "gpus.lock": "",
        "tidegate.env": "TIDEGATE_AUTH=required",
        "secrets/valkey/worker": "pw",
        "run/stack.json": "{}",
        "log/gateway.log": "x",
        "cache/big": "x",
        "replicas/a/launch": "x",
        f"data/artifacts/sha256/ab/ab/{DIGEST}": "model",
        "data/artifacts/incoming/half": "x",
        "data/blobs/a/b": "tensor",
        "data/rabbitmq/node": "x",
        "data/valkey/valkey.conf": "x",
        "data/dead-letters/1.jsonl": "{}",
        "data/jobs/valkey.conf": "x",
        "data/jobs/appendonlydir/a.aof.manifest": "file a.1.base.rdb seq 1 type b\n"
        "file a.2.incr.aof seq 2 type i\nfile a.0.incr.aof seq 0 type h\n",
        "data/jobs/appendonlydir/a.1.base.rdb": "base",
        "data/jobs/appendonlydir/a.2.incr.aof": "incr",
        "data/jobs/appendonlydir/a.0.incr.aof": "old",
    }.items():
        fill(state / name, text)
    return state


def test_the_content_of_a_backup_and_where_a_restore_puts_it(tmp_path: Path, state: Path) -> None:
    manifest = backup(settings_in(state), tmp_path / "b.tgz")
    assert sorted(manifest.files) == [
        f"artifacts/sha256/ab/ab/{DIGEST}",
        "blobs/a/b",
        "database.sqlite",
        "jobs/appendonlydir/a.1.base.rdb",
        "jobs/appendonlydir/a.2.incr.aof",
        "jobs/appendonlydir/a.aof.manifest",
        "state/data/dead-letters/1.jsonl",
        "state/data/history.db",
        "state/secrets/valkey/worker",
        "state/tidegate.env",
        "state/token",
    ]
    assert (manifest.schema, manifest.counts, manifest.left_out) == ("0003", {"versions": 1}, {})
    new = tmp_path / "new"
    restore(settings_in(new), tmp_path / "b.tgz")
    assert (new / "data" / "jobs" / "appendonlydir" / "a.2.incr.aof").read_text() == "incr"
    assert (new / "data" / "blobs" / "a" / "b").read_text() == "tensor"
    assert (new / "token").read_text() == "secret"
    assert databases.artifacts(new / "data" / "registry.db") == {DIGEST}
    assert sorted(path.name for path in new.iterdir()) == ["data", "secrets", "tidegate.env", "token"]
    assert (new / "token").stat().st_mode & 0o777 == 0o600


def test_existing_data_is_kept(tmp_path: Path, state: Path) -> None:
    backup(settings_in(state), tmp_path / "b.tar")
    fill(state / "token", "newer")
    fill(state / "runtime" / "triton", "installed")
    with pytest.raises(BackupError, match=r"Data exists already: .*state/data"):
        restore(settings_in(state), tmp_path / "b.tar")
    assert (state / "token").read_text() == "newer"
    restore(settings_in(state), tmp_path / "b.tar", force=True)
    assert (state / "token").read_text() == "secret"
    (aside,) = state.glob("before-restore-*")
    assert (aside / "token").read_text() == "newer"
    assert (aside / "data" / "rabbitmq" / "node").is_file(), "messages of another state are not mixed in"
    assert not (state / "data" / "rabbitmq").exists()
    assert (state / "runtime" / "triton").is_file()


def test_a_damaged_backup_changes_nothing(tmp_path: Path, state: Path) -> None:
    place = tmp_path / "b.tar"
    backup(settings_in(state), place)
    content = place.read_bytes()
    at = content.index(b"model", content.index(DIGEST.encode()))
    place.write_bytes(content[:at] + b"M" + content[at + 1 :])
    with pytest.raises(BackupError, match=f"1 of 11 files are missing or differ .*{DIGEST}"):
        restore(settings_in(tmp_path / "new"), place, force=True)
    assert not (tmp_path / "new").exists()


def test_stores_outside_of_the_state_folder(tmp_path: Path, state: Path) -> None:
    outside = {
        "artifact_url": f"file://{tmp_path}/models",
        "database_url": f"sqlite+aiosqlite:///{tmp_path}/r.db",
    }
    fill(tmp_path / "models" / "sha256" / "ab" / "ab" / DIGEST, "model")
    registry(tmp_path / "r.db", DIGEST)
    away = {"blob_url": "s3://bucket/blobs", "jobs_url": "redis://elsewhere:6379/0"}
    manifest = backup(settings_in(state, **outside, **away), tmp_path / "b.tar")
    assert sorted(manifest.left_out) == ["blobs", "jobs"]
    with pytest.raises(BackupError, match=r"Data exists already: .*models"):
        restore(settings_in(tmp_path / "new", **outside), tmp_path / "b.tar")
    moved = {name: url.replace(str(tmp_path), f"{tmp_path}/other") for name, url in outside.items()}
    restore(settings_in(tmp_path / "new", **moved), tmp_path / "b.tar")
    assert databases.artifacts(tmp_path / "other" / "r.db") == {DIGEST}
    assert (tmp_path / "other" / "models" / "sha256" / "ab" / "ab" / DIGEST).read_text() == "model"
    with pytest.raises(BackupError, match=r"has a sqlite database, .* a postgresql database"):
        restore(settings_in(tmp_path / "new", database_url="postgresql+asyncpg://u@h/d"), tmp_path / "b.tar")


def test_a_missing_artifact_fails_the_backup(tmp_path: Path, state: Path) -> None:
    (state / "data" / "artifacts" / "sha256" / "ab" / "ab" / DIGEST).unlink()
    with pytest.raises(BackupError, match=f"artifact {DIGEST} is not there"):
        backup(settings_in(state), tmp_path / "b.tar")
    assert list(tmp_path.glob("*.tar*")) == []


def test_a_folder_without_a_stack_cannot_be_backed_up(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"has no data of a stack.*TIDEGATE_STATE_DIR"):
        backup(settings_in(tmp_path), tmp_path / "b.tar")


@pytest.mark.parametrize(
    "name", ["state/runtime/bin/tritonserver", "state/run/stack.json", "state/data/rabbitmq/plugins/x"]
)
def test_a_backup_brings_no_program(tmp_path: Path, name: str) -> None:
    source = tmp_path / "evil"
    source.write_text("#!/bin/sh")
    with written(tmp_path / "b.tar", Manifest(database=databases.SQLITE)) as writer:
        writer.add(name, source)
    with pytest.raises(BackupError, match="does not know"):
        restore(settings_in(tmp_path / "new"), tmp_path / "b.tar")
    assert not (tmp_path / "new").exists()


def test_an_unknown_kind_of_database_is_rejected(tmp_path: Path) -> None:
    with written(tmp_path / "b.tar", Manifest(database="\x1b[2J")):
        pass
    with pytest.raises(BackupError, match="unknown kind of database"):
        restore(settings_in(tmp_path / "new"), tmp_path / "b.tar")
