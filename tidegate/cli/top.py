"""``tidegate top``: the endpoints of a stack, live."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli import output
from tidegate.cli.api import Service, control, part
from tidegate.cli.options import Json, seconds
from tidegate.cli.output import console, plain
from tidegate.kernel.errors import TidegateError, Unavailable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# The orders in which the endpoints can be sorted. Each order has a key of the keyboard, a title and a sort
# function.
ORDERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "r": ("rate", lambda item: -item["rate"]),
    "p": ("p99", lambda item: -(item["p99_ms"] or 0.0)),
    "e": ("errors", lambda item: -(item["error_rate"] or 0.0)),
    "u": ("queue", lambda item: -(item["queue"] or 0)),
    "n": ("name", lambda item: item["endpoint"]),
}
HELP = "q quit   sort by: r rate, p p99, e errors, u queue, n name"
NONE = "No endpoint exists. Deploy a model: tidegate deploy FILE"
BARS = "▁▂▃▄▅▆▇█"
POINTS = 20
# At the start, read the past rates of at most this many endpoints, because each needs a separate request.
MOST_FILLED = 50
# The smallest terminal width at which each of these columns is shown, in characters.
_WIDTHS = {"cost/h": 150, "callers": 140, "drift": 130, "busy": 120, "past": 110, "why": 95}


def top(
    once: Annotated[bool, typer.Option("--once", help="Print the numbers once and exit.")] = False,
    every: Annotated[str, typer.Option(metavar="TIME", help="Time between two readings.")] = "2s",
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.svg", help="Draw the view once, as a picture.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the endpoints live: rate, times, errors, queue, replicas, drift, cost, alerts.

    The column `why` gives the reason for the number of replicas. Rates and times are those of the last 30 s.
    q or Ctrl-C quits. Example: tidegate top --once --json
    """
    router = control().router
    if plot is not None:
        Screen(router, 1.0).draw(plot)
        output.say(f"The picture is in {plot}.")
        return
    if json or once or not sys.stdout.isatty():
        found = router.get("/v1/top")
        output.show(found, json, lambda: output.table(rows(found["items"]), HEADS, NONE))
        return
    Screen(router, max(0.5, seconds(every))).run()


HEADS = (
    "endpoint",
    "req/s",
    "p50 ms",
    "p99 ms",
    "errors",
    "queue",
    "replicas",
    "busy",
    "drift",
    "alerts",
    "why",
)


def rows(items: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the rows of the table that `--once` prints, one for each endpoint."""
    return [
        (
            item["endpoint"],
            _number(item["rate"]),
            _number(item["p50_ms"]),
            _number(item["p99_ms"]),
            _percent(item["error_rate"]),
            item["queue"],
            replicas(item),
            _percent(item["utilization"], digits=0),
            item["drift"],
            ", ".join(item["alerts"]),
            item["why"],
        )
        for item in items
    ]


def replicas(item: Mapping[str, Any]) -> str:
    """Return ``2/3 +1``: ready replicas, desired replicas, and replicas that start."""
    starting = f" +{item['starting']}" if item["starting"] else ""
    return f"{item['ready']}/{item['desired']}{starting}"


class Screen:
    """The live view of all endpoints, for a terminal or as a picture."""

    def __init__(self, router: Service, every_s: float) -> None:
        self._router = router
        self._every_s = every_s
        self._order = "r"
        self._problem = ""
        self._items: list[dict[str, Any]] = []
        self._rates: dict[str, deque[float]] = {}

    def run(self) -> None:
        """Show the view until q or Ctrl-C. Restore the terminal afterwards."""
        from rich.live import Live

        from tidegate.cli.interrupts import interrupted_by_signals
        from tidegate.cli.keyboard import keys

        with (
            suppress(KeyboardInterrupt),
            interrupted_by_signals(),
            keys() as pressed,
            Live(console=console(), screen=True, auto_refresh=False) as live,
        ):
            self.read()
            self.fill()
            while True:
                live.update(self.render(live.console.width), refresh=True)
                end = time.monotonic() + self._every_s
                while (left := end - time.monotonic()) > 0:
                    key = pressed(left)
                    if key in ("q", "Q", "\x03", "\x04"):
                        return
                    if key in ORDERS:
                        self._order = key
                        live.update(self.render(live.console.width), refresh=True)
                self.read()

    def draw(self, file: str, width: int = 170) -> None:
        """Write the view as a picture (SVG)."""
        import io
        import re

        from rich.console import Console

        self.read()
        self.fill()
        if self._problem:
            raise Unavailable(self._problem)
        drawn = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, emoji=False)
        drawn.print(self.render(width))
        picture = drawn.export_svg(title="tidegate top")
        # The library ``rich`` lets the SVG load fonts from a server. Remove these fonts, because the picture
        # must not load other files.
        picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL).replace("Fira Code, ", "")
        Path(file).write_text(picture, encoding="utf-8")

    def fill(self) -> None:
        """Read each endpoint's rates of the last 120 s, so that its bars are not empty at the start."""
        for item in self._items[:MOST_FILLED]:
            with suppress(TidegateError):
                past = self._router.items(f"/v1/history/{part(item['endpoint'])}", last_s=120.0)[-POINTS:]
                spans = [(each["requests"], each["end"] - each["start"]) for each in past]
                rates = [count / length for count, length in spans if length]
                self._rates[item["endpoint"]] = deque(rates, maxlen=POINTS)

    def read(self) -> None:
        """Read the numbers of all endpoints. After an error, keep the last numbers and store the message."""
        try:
            self._items = self._router.items("/v1/top")
            self._problem = ""
        except TidegateError as error:
            self._problem = error.message
            return
        for item in self._items:
            self._rates.setdefault(item["endpoint"], deque(maxlen=POINTS)).append(item["rate"])

    def render(self, width: int) -> RenderableType:
        """Return the view for a terminal of this width."""
        from rich.console import Group
        from rich.text import Text

        firing = sum(len(item["alerts"]) for item in self._items)
        rate = sum(item["rate"] for item in self._items)
        count = len(self._items)
        endpoints = "1 endpoint" if count == 1 else f"{count} endpoints"
        head = Text(f"Tidegate  {endpoints}  {_number(rate)} requests/s  ", style="bold")
        alerts = "1 alert fires" if firing == 1 else f"{firing} alerts fire"
        head.append(alerts if firing else "no alert", style="red" if firing else "green")
        head.append(time.strftime("  %H:%M:%S"), style="dim")
        foot = Text(f"{HELP}   (now by {ORDERS[self._order][0]})", style="dim", no_wrap=True)
        if self._problem:
            foot = Text(self._problem, style="red")
        return Group(head, Text(), self._table(width), Text(), foot)

    def _table(self, width: int) -> Table:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
        shown = [head for head in _COLUMNS if width >= _WIDTHS.get(head, 0)]
        for head in shown:
            left = head in ("endpoint", "past", "why", "drift", "alerts")
            table.add_column(
                head, justify="left" if left else "right", no_wrap=True, overflow="ellipsis",
                ratio=1 if head == "why" else None,
            )  # fmt: skip
        for item in sorted(self._items, key=ORDERS[self._order][1]):
            cells = _cells(item, self._rates.get(item["endpoint"], ()))
            table.add_row(*(cells[head] for head in shown), style=_style(item))
        return table


_COLUMNS = (
    "endpoint", "req/s", "past", "p50 ms", "p99 ms", "errors", "queue", "replicas", "busy", "callers",
    "drift", "cost/h", "alerts", "why",
)  # fmt: skip


def _cells(item: Mapping[str, Any], rates: Sequence[float]) -> dict[str, str]:
    cells = {
        "endpoint": item["endpoint"],
        "req/s": _number(item["rate"]),
        "past": sparkline(rates),
        "p50 ms": _number(item["p50_ms"]),
        "p99 ms": _number(item["p99_ms"]),
        "errors": _percent(item["error_rate"]),
        "queue": "-" if item["queue"] is None else str(item["queue"]),
        "replicas": replicas(item),
        "busy": _percent(item["utilization"], digits=0),
        "callers": str(item["callers_today"] or "-"),
        "drift": item["drift"] or "-",
        "cost/h": "-" if item["cost_per_hour"] is None else f"{item['cost_per_hour']:.3g}",
        "alerts": ", ".join(item["alerts"]) or "-",
        "why": item["why"],
    }
    return {name: plain(cell) for name, cell in cells.items()}


def _style(item: Mapping[str, Any]) -> str:
    if item["alerts"] or (item["error_rate"] or 0) > 0.05:
        return "red"
    if item["ready"] < item["desired"] or item["drift"] == "drifted":
        return "yellow"
    return "" if item["rate"] else "dim"


def sparkline(values: Sequence[float]) -> str:
    """Return values as small bars, relative to the largest."""
    most = max(values, default=0.0)
    if most <= 0:
        return ""
    last = len(BARS) - 1
    return "".join(BARS[min(last, int(value / most * last + 0.5))] for value in values)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value * 100:.{digits}f}%"
