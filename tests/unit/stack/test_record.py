"""The record of a stack, its token, the length of its logs, and the backoff of its children."""

from __future__ import annotations

import stat
from pathlib import Path

from tidegate.kernel.protocol.access import metrics_token
from tidegate.stack import log_rotation, token
from tidegate.stack.child_supervisor import BACKOFF_S, backoff_s
from tidegate.stack.processes import Process
from tidegate.stack.record import ChildRecord, RunFolder, StackRecord, with_child
from tidegate.stack.starting import Progress, ProgressReporter

RECORD = StackRecord(
    "running",
    Process(10, 1000),
    (ChildRecord("valkey", "ready", Process(11, 1001), (8079,), 2, 5.0, "", "/log"), ChildRecord("gateway")),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    RunFolder(tmp_path).write(RECORD)
    assert RunFolder(tmp_path).read() == RECORD


def test_no_record_and_a_broken_one_read_as_empty(tmp_path: Path):
    assert RunFolder(tmp_path).read() == StackRecord()
    (tmp_path / "stack.json").write_text('{"phase": "runn')
    assert RunFolder(tmp_path).read() == StackRecord()


def test_with_child_changes_one_child():
    changed = with_child(RECORD, "gateway", state="ready", restarts=1)
    assert changed.children == (RECORD.children[0], ChildRecord("gateway", "ready", restarts=1))


def test_a_lock_is_held_once(tmp_path: Path):
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    assert first.hold("supervisor")
    assert not second.hold("supervisor")


def test_every_change_is_reported_once():
    told: list[tuple[str, str]] = []

    def on_progress(progress: Progress) -> None:
        told.append((progress.name, progress.state))

    watch = ProgressReporter(on_progress)
    watch.skip(StackRecord("running", None, (ChildRecord("valkey", "ready"),)))
    watch.show(RECORD)
    watch.show(RECORD)
    watch.show(with_child(RECORD, "gateway", state="ready"))
    assert told == [("gateway", "waiting"), ("gateway", "ready")]


def test_the_backoff_grows_to_its_maximum():
    assert [backoff_s(n) for n in range(1, len(BACKOFF_S) + 2)] == [*BACKOFF_S, BACKOFF_S[-1]]


def test_a_token_is_made_once_and_private(tmp_path: Path):
    path = token.ensure(tmp_path)
    value = path.read_text()
    assert len(value.strip()) >= 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token.ensure(tmp_path).read_text() == value
    assert [p.name for p in tmp_path.iterdir()] == ["token"]


def test_an_empty_token_is_replaced(tmp_path: Path):
    (tmp_path / "token").write_text("\n")
    assert token.ensure(tmp_path).read_text().strip()


def test_a_long_log_is_moved_and_its_writer_continues(tmp_path: Path):
    log = tmp_path / "gateway.log"
    with log.open("a") as writer:
        writer.write("x" * 100)
        writer.flush()
        log_rotation.shorten(tmp_path, limit_bytes=50)
        writer.write("after\n")
    assert log.read_text() == "after\n"
    assert (tmp_path / "gateway.log.1").read_text() == "x" * 100


def test_the_metrics_token_is_derived_and_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDEGATE_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("TIDEGATE_SERVICE_TOKEN", raising=False)
    monkeypatch.setattr("sys.argv", ["token"])
    token.main()
    service_token, path = (tmp_path / "token").read_text().strip(), tmp_path / "metrics" / "token"
    assert path.read_text().strip() == metrics_token(service_token) != service_token
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["token"]
    monkeypatch.setattr("sys.argv", ["token", "--share-metrics"])
    monkeypatch.setenv("TIDEGATE_SERVICE_TOKEN", "stated")
    token.main()
    assert path.read_text().strip() == metrics_token("stated")
    assert path.stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
