"""Read the logs of replicas together, and find the lines about a request."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tidegate.kernel import log_files
from tidegate.kernel.errors import NotFound
from tidegate.kernel.log_files import LogFolder
from tidegate.kernel.protocol import log_lines


def line(at: float, message: str, **more: str) -> str:
    told = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": told, "message": message} | more) + "\n"


def messages(folder: LogFolder, *logs: str, since: float = -1, until: float = 1e11, lines: int = 100):
    return [each.fields["message"] for each in folder.read(logs, since=since, until=until, lines=lines)]


@pytest.fixture
def folder(tmp_path: Path) -> LogFolder:
    (tmp_path / "worker-m-v1-0-1.log").write_text("early\n" + line(1, "one") + "more\n" + line(4, "four"))
    (tmp_path / "worker-m-v1-0-2.log").write_text(line(2, "two") + line(3, "three") + '{"half')
    (tmp_path / "gateway.log").write_text(line(1, "ask", request_id="r1", client_id="mine"))
    (tmp_path / "router.log").write_text(line(3, "dead letter", request_id="r1"))
    return LogFolder(tmp_path)


def test_replicas_are_merged_by_time_and_what_is_half_written_waits(folder: LogFolder) -> None:
    logs = ("m-v1-0-1", "m-v1-0-2")
    assert messages(folder, *logs) == ["early", "one", "more", "two", "three", "four"]
    assert messages(folder, *logs, lines=2) == ["three", "four"]
    assert messages(folder, *logs, lines=0) == []
    assert messages(folder, *logs, since=1, until=3) == ["two", "three"]


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_a_log_is_read_from_its_end_and_over_its_rotation(
    folder: LogFolder, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(log_files, "BLOCK", block)
    for name, numbers in ((".log.2", range(10)), (".log.1", range(10, 20)), (".log", range(20, 30))):
        text = "".join(line(100 + number, str(number)) for number in numbers)
        (folder.path / f"worker-long-0-1{name}").write_text(text)
    assert messages(folder, "long-0-1", lines=15) == [str(number) for number in range(15, 30)]
    assert messages(folder, "long-0-1", since=127.5) == ["28", "29"]
    assert messages(folder, "long-0-1") == [str(number) for number in range(30)]


def test_a_name_that_is_not_there_says_near_ones(folder: LogFolder) -> None:
    assert folder.find("m") == ["m-v1-0-1", "m-v1-0-2"]
    with pytest.raises(NotFound, match=r"Similar names: gateway\."):
        folder.find("gatway")
    with pytest.raises(NotFound, match="tidegate status"):
        folder.find("../../unlike")


def test_a_request_is_found_in_all_logs_by_each_of_its_ids(folder: LogFolder) -> None:
    with (folder.path / "worker-m-v1-0-2.log").open("a") as log:
        log.write('"}\n' + line(2, "request failed", request_id="r1") + line(2, "other", request_id="r11"))
    for id_ in ("r1", "mine"):
        found = [(each.log, each.fields["message"]) for each in folder.of_request(id_)]
        assert found == [("gateway", "ask"), ("m-v1-0-2", "request failed"), ("router", "dead letter")]
    assert folder.of_request("r2") == []


def test_one_id_for_all_requests_costs_no_memory_and_the_last_lines_are_shown(
    folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_OF_REQUEST", 5)
    text = "".join(line(100 + number, str(number), request_id="same") for number in range(40))
    (folder.path / "gateway.log").write_text(text)
    found = [each.fields["message"] for each in folder.of_request("same")]
    assert found == ["35", "36", "37", "38", "39"]


def test_a_short_id_is_not_looked_for_within_others(
    folder: LogFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a line was parsed that only has the id within a word")

    monkeypatch.setattr(log_lines, "parse", refuse)
    assert folder.of_request("e") == []


def test_the_logs_of_a_deployment_whose_name_begins_like_a_file(folder: LogFolder) -> None:
    (folder.path / "worker-worker-m-v1-0-1.log").write_text(line(1, "its own"))
    assert messages(folder, *folder.find("worker-m")) == ["its own"]
