"""Which logs a name means, when a line was written, and how a span of time is read."""

from __future__ import annotations

import pytest

from tidegate.kernel.protocol import log_lines

LOGS = ["gateway", "digits-v1-0-1", "digits-v1-0-12", "digits-v10-0-1", "digits-v10x-0-1", "other-0-1"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gateway", ["gateway"]),
        ("digits-v1-0-12", ["digits-v1-0-12"]),
        ("digits-v1", ["digits-v1-0-1", "digits-v1-0-12"]),
        ("digits", ["digits-v1-0-1", "digits-v1-0-12", "digits-v10-0-1"]),
        ("other", ["other-0-1"]),
        ("digit", []),
        ("../gateway", []),
        ("d.gits", []),
    ],
)
def test_a_name_means_a_service_a_replica_or_all_replicas(name: str, found: list[str]) -> None:
    assert log_lines.meant(name, LOGS) == found


def test_an_endpoint_means_the_deployments_behind_it() -> None:
    assert log_lines.meant("shop", LOGS, ["other"]) == ["other-0-1"]


def test_near_names_are_few_and_not_all() -> None:
    many = [f"m{number}-v1-0-1" for number in range(60)]
    assert "digits" in log_lines.near("digitz", [*LOGS, *many])
    assert len(log_lines.near("digitz", [*LOGS, *many])) <= log_lines.NEAR
    assert log_lines.near("shp", LOGS, ["shop"]) == ["shop"]
    assert log_lines.near("entirely-unlike", LOGS) == []


@pytest.mark.parametrize(
    ("text", "ago"), [("30s", 30), ("10m", 600), ("1h30m", 5400), ("2d", 172_800), ("0.5h", 1800)]
)
def test_a_span(text: str, ago: float) -> None:
    assert log_lines.since(text, 1_000_000.0) == 1_000_000.0 - ago


def test_an_iso_time() -> None:
    assert log_lines.since("2026-01-31T10:00:00+00:00", 0.0) == 1_769_853_600.0


@pytest.mark.parametrize("text", ["", "10", "m", "10 parsecs", "yesterday", "m10"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="10m"):
        log_lines.since(text, 0.0)


def test_a_line_without_a_time_has_that_of_the_line_before() -> None:
    line = '{"time": "2026-01-31T10:00:00.500+00:00", "message": "x"}'
    entry = log_lines.parse(line, "m-0-1", 0.0)
    assert entry.at == 1_769_853_600.5
    assert log_lines.parse("plain", "m-0-1", entry.at) == (entry.at, "m-0-1", {"message": "plain"})
    assert log_lines.parse("[1]", "m-0-1", 7.0).at == 7.0


def test_the_ids_of_a_line_and_those_that_lead_on() -> None:
    access = log_lines.LogEntry(
        0, "access", {"request_id": "r", "client_id": "c", "job": "j", "message": "x"}
    )
    assert log_lines.ids_in(access.fields) == {"r", "c", "j"}
    assert log_lines.linked([access]) == {"r", "j"}
    assert log_lines.ids_in({"request_ids": ["a", "b"], "request_id": ""}) == {"a", "b"}


@pytest.mark.parametrize(
    ("file", "log"),
    [
        ("gateway.log", "gateway"),
        ("access.log.3", "access"),
        ("worker-m-v1-0-1.log", "m-v1-0-1"),
        ("worker-my.logistic_2-v1-0-1.log.1", "my.logistic_2-v1-0-1"),
        ("worker-x.log-v1-0-1.log", "x.log-v1-0-1"),
        ("notes.txt", ""),
    ],
)
def test_the_log_that_a_file_has(file: str, log: str) -> None:
    assert log_lines.log_of(file) == log
