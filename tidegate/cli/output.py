"""Print results on stdout, and everything else on stderr.

With ``--json`` stdout is one JSON document and nothing more. Colours appear only on a terminal, and not if
``NO_COLOR`` is set. rich is imported on first use, so that ``--help`` and ``--json`` start faster.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any

import orjson

from tidegate.cli.options import parsed

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "ready": "green",
    "done": "green",
    "running": "green",
    "created": "green",
    "yes": "green",
    "starting": "yellow",
    "draining": "yellow",
    "restarting": "yellow",
    "waiting": "dim",
    "asleep": "dim",
    "unchanged": "dim",
    "updated": "yellow",
    "failed": "red",
    "stopped": "red",
    "not ready": "red",
    "no answer": "red",
}


# Characters with which a text can control a terminal: its colours, title, clipboard or order of letters.
# Newlines and tabs are not in this set, because they are harmless.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Return the text with its control characters escaped.

    The text may come from a model or a caller, and they must not control the terminal.
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


@cache
def console(stderr: bool = False) -> Console:
    """Return a console of the library ``rich`` for stdout or stderr.

    The console wraps long lines only on a terminal. Programs that read the output need whole lines.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 10_000
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def say(message: str, style: str | None = None) -> None:
    """Print a message about progress on stderr."""
    console(stderr=True).print(plain(message), style=style)


def dump(data: Any) -> None:
    """Print ``data`` on stdout as JSON. A command with ``--json`` prints one such document."""
    text = orjson.dumps(data, default=str, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    sys.stdout.write(text.decode() + "\n")
    sys.stdout.flush()


def show(data: Any, json: bool, human: Callable[[], None]) -> None:
    """Show a command's result: print ``data`` as JSON if ``json``, else call ``human``, which prints text."""
    if json:
        dump(data)
    else:
        human()


def line(text: str = "", style: str | None = None) -> None:
    """Print one line of a result on stdout."""
    console().print(plain(text), style=style)


def table(rows: Sequence[Sequence[Any]], columns: Sequence[str], empty: str = "none") -> None:
    """Print rows in aligned columns. If there are no rows, print ``empty`` on stderr.

    Cells with a known state, such as "ready", have a colour.
    """
    from rich.text import Text

    if not rows:
        say(empty)
        return
    cells = [[text_of(cell) for cell in row] for row in rows]
    heads = [column.upper() for column in columns]
    widths = widths_of([heads, *cells])
    console().print(Text("  ".join(padded(heads, widths)).rstrip(), style="bold"))
    for row in cells:
        line_ = Text()
        for cell, pad in zip(row, padded(row, widths), strict=True):
            line_.append(pad + "  ", style=STYLES.get(cell, ""))
        line_.rstrip()
        console().print(line_)


def widths_of(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column."""
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]


def padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return the cells of a row, each as wide as its column."""
    return [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]


def text_of(cell: Any) -> str:
    """Format a value for a table; a missing value becomes a dash."""
    if cell is None or cell == "":
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"
    if isinstance(cell, Mapping):
        return " ".join(f"{key}={text_of(value)}" for key, value in cell.items()) or "-"
    if isinstance(cell, list | tuple):
        return ", ".join(text_of(item) for item in cell) or "-"
    return plain(" ".join(str(cell).split()))


def size_of(count: float) -> str:
    """Format a number of bytes: ``118 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def money_of(amount: float) -> str:
    """Format an amount of money.

    Amounts below 0.01 get three significant digits, because a single request costs very little.
    """
    return f"{amount:.2f}" if amount >= 100 else f"{amount:.4f}" if amount >= 0.01 else f"{amount:.3g}"


def moment(value: float | str | None) -> str:
    """Format seconds since 1970, or an ISO time, as local time without fractions of a second."""
    if not value:
        return "-"
    try:
        when = parsed(value) if isinstance(value, str) else datetime.fromtimestamp(value, timezone.utc)
    except ValueError:
        return str(value)
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S")
