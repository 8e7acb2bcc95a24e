"""The live view: its lines, orders, and columns for the width of the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tidegate.cli.api import Service
from tidegate.cli.top import Screen, rows, sparkline
from tidegate.kernel.errors import Unavailable

pytestmark = pytest.mark.unit


def line(name: str, **more: Any) -> dict[str, Any]:
    return {
        "endpoint": name, "rate": 10.0, "p50_ms": 2.0, "p99_ms": 9.0, "error_rate": 0.0, "queue": 0,
        "queue_age_s": 0.0, "utilization": 0.25, "ready": 1, "desired": 1, "starting": 0,
        "why": "enough replicas", "callers_today": 3, "cost_per_hour": None, "drift": None, "alerts": [],
    } | more  # fmt: skip


class Router(Service):
    """A router that answers with fixed lines."""

    def __init__(self, *lines: dict[str, Any]) -> None:
        super().__init__("router", "http://127.0.0.1:1", "")
        self.lines = list(lines)
        self.problem = ""

    def items(self, path: str, **query: Any) -> list[dict[str, Any]]:
        if self.problem:
            raise Unavailable(self.problem)
        if path.startswith("/v1/history"):
            return [{"requests": 10 * n, "start": 0.0, "end": 5.0} for n in range(1, 9)]
        return self.lines


def seen(screen: Screen, width: int = 160) -> list[str]:
    screen.read()
    console = Console(file=io.StringIO(), width=width)
    console.print(screen.render(width))
    assert isinstance(console.file, io.StringIO)
    return [each.strip() for each in console.file.getvalue().splitlines() if each.strip()]


def test_lines_are_sorted_and_alerts_are_counted():
    quiet = line("quiet", rate=0.0, p99_ms=None, error_rate=None)
    screen = Screen(Router(quiet, line("busy", alerts=["ErrorRate"], starting=1, desired=2)), 1.0)
    shown = seen(screen)
    assert shown[0].startswith("Tidegate  2 endpoints  10.0 requests/s  1 alert fires")
    assert [each.split()[0] for each in shown if each.split()[0] in ("busy", "quiet")] == ["busy", "quiet"]
    assert "1/2 +1" in next(each for each in shown if each.startswith("busy"))
    screen._order = "n"
    assert seen(screen)[-1].endswith("(now by name)")


def test_a_narrow_terminal_has_fewer_columns():
    screen = Screen(Router(line("one")), 1.0)
    assert {"callers", "drift", "why", "cost/h"} <= set(seen(screen, 160)[1].split())
    narrow = seen(screen, 80)
    assert "why" not in narrow[1].split()
    assert max(map(len, narrow)) <= 80


def test_a_problem_is_shown_and_the_last_numbers_stay():
    router = Router(line("one"))
    screen = Screen(router, 1.0)
    seen(screen)
    router.problem = "The router does not answer."
    shown = seen(screen)
    assert shown[-1] == "The router does not answer."
    assert any(each.startswith("one") for each in shown)


def test_bars():
    assert sparkline([]) == sparkline([0.0, 0.0]) == ""
    assert sparkline([0, 1, 2, 4]) == "▁▃▅█"


def test_once_and_the_picture(tmp_path: Path):
    (row,) = rows([line("one", error_rate=0.012)])
    assert row[:7] == ("one", "10.0", "2.0", "9.0", "1.2%", 0, "1/1")
    Screen(Router(line("one")), 1.0).draw(str(tmp_path / "top.svg"))
    picture = (tmp_path / "top.svg").read_text()
    assert "tidegate" in picture
    assert "woff" not in picture
