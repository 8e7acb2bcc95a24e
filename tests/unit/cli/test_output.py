"""Tables, cells and log lines as people and pipes see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from tidegate.cli import logs, options, output
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.progress import Steps


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        ("", "-"),
        (0, "0"),
        (True, "yes"),
        (1.23456, "1.23"),
        (12345.6, "12346"),
        ({"a": 1, "b": 0.5}, "a=1 b=0.5"),
        ([], "-"),
        (["x", None], "x, -"),
        ("two\nlines", "two lines"),
    ],
)
def test_cells(cell: Any, text: str) -> None:
    assert output.text_of(cell) == text


def test_columns_are_aligned_and_never_folded(capsys: pytest.CaptureFixture[str]) -> None:
    output.table([("a", "x" * 300), ("long name", "[red]")], ("name", "value"))
    out = capsys.readouterr().out
    assert out.splitlines() == ["NAME       VALUE", "a          " + "x" * 300, "long name  [red]"]
    assert "\x1b" not in out


def test_no_rows_are_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.table([], ("name",), "Nothing here.")
    assert capsys.readouterr() == ("", "Nothing here.\n")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (118_000, "118 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert output.size_of(count) == text


def test_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.moment(None) == "-"
    assert output.moment("yesterday") == "yesterday"
    assert output.moment(0.5) == output.moment("1970-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("text", "found"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("250ms", 0.25)]
)
def test_durations(text: str, found: float) -> None:
    assert options.seconds(text) == found


@pytest.mark.parametrize("text", ["", "x", "-1", "5 weeks", "1h30"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        options.seconds(text)


def test_pairs() -> None:
    assert options.pairs("--tag", ["a=b=c", "d="]) == {"a": "b=c", "d": ""}
    assert options.numbers("--metric", ["f1=0.5"]) == {"f1": 0.5}
    with pytest.raises(UsageError, match="write --tag KEY=VALUE"):
        options.pairs("--tag", ["a"])
    with pytest.raises(UsageError, match="'high' is not a number"):
        options.numbers("--metric", ["f1=high"])


def test_steps_in_a_pipe_are_one_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps().shown() as steps:
        steps.change("registry", "starting")
        steps.change("registry", "starting")
        steps.change("registry", "ready", "port 8010")
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["registry: starting", "registry: ready (port 8010)"]
    assert "✓ registry  ready  port 8010" in steps.render().plain


def test_log_lines_for_people() -> None:
    text = (
        '{"time": "2024-05-31T10:00:00.123+00:00", "level": "warning", "service": "router", '
        '"logger": "x", "message": "late", "ms": 7}'
    )
    assert logs.pretty(text) == "10:00:00.123 WARNING late ms=7"
    assert logs.pretty("plain") == "plain"
    assert logs.pretty('{"a": 1}') == '{"a": 1}'


@pytest.mark.parametrize(("lines", "expected"), [(0, []), (2, ["8", "9"]), (99, [str(i) for i in range(10)])])
def test_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int, expected: list[str]) -> None:
    monkeypatch.setattr(logs, "BLOCK", 3)
    path = tmp_path / "x.log"
    path.write_text("".join(f"{i}\n" for i in range(10)))
    assert logs.tail(path, lines) == expected


CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"


def test_a_terminal_does_not_obey_what_a_model_says(capsys: pytest.CaptureFixture[str]) -> None:
    reason = f"a\x1b[2J{CLIPBOARD}\x9b31m\u202eb\r"
    output.table([(reason, {"k": reason})], ("why", "more"))
    output.line(reason)
    output.say(reason)
    with Steps().shown() as steps:
        steps.change("model", "failed", reason)
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    assert "a\\x1b[2J" in found.out


def test_a_log_on_a_terminal_is_plain_and_a_pipe_gets_it_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"log": "m-0-1", "time": "2026-01-31T10:00:00.123+00:00", "source": "model", "message": CLIPBOARD}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    logs._show_lines([line])
    assert capsys.readouterr().out == "10:00:00.123 m-0-1 | \\x1b]52;c;cm0gLXJm\\x07\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    logs._show_lines([line])
    assert orjson.loads(capsys.readouterr().out) == line
