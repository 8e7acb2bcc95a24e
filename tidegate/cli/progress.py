"""Show progress: a live list on a terminal; elsewhere one plain line for each change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tidegate.cli.output import STYLES, console, padded, plain, say, widths_of

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

MARKS = {"ready": "✓", "done": "✓", "failed": "✗", "stopped": "✓"}


class Steps:
    """A list of steps, each with a name, a state and a short detail."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, str]] = {}
        self._live: Live | None = None
        self._began = time.monotonic()

    def change(self, name: str, state: str, detail: str = "") -> None:
        """Show the new state of the step ``name``. Do nothing if this state is already shown.

        Only the first line of a detail is shown; the error message has the rest.
        """
        detail = plain(detail.strip().partition("\n")[0])
        if self._rows.get(name) == (state, detail):
            return
        self._rows[name] = (state, detail)
        if self._live is None:
            elapsed = time.monotonic() - self._began
            say(f"[{elapsed:5.1f} s] {name}: {state}{f' ({detail})' if detail else ''}")

    def rows(self) -> list[list[str]]:
        """Return mark, name, state and detail of each step, in order of first appearance."""
        spinner = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"[int(time.monotonic() * 10) % 10]
        return [
            [MARKS.get(state, spinner), name, state, detail] for name, (state, detail) in self._rows.items()
        ]

    def render(self) -> Text:
        """Return the list of steps in its present state, as text for a terminal."""
        from rich.text import Text

        rows, text = self.rows(), Text()
        widths = widths_of(rows) if rows else []
        for row in rows:
            pads = padded(row, widths)
            style = STYLES.get(row[2], "")
            text.append(pads[0] + " ", style=style)
            text.append(pads[1] + "  ")
            text.append(pads[2] + "  ", style=style)
            text.append(row[3], style="dim")
            text.append("\n")
        text.rstrip()
        return text

    @contextmanager
    def shown(self) -> Iterator[Steps]:
        """Show the steps while the ``with`` block runs. The last state stays on the screen."""
        if not console(stderr=True).is_terminal:
            yield self
            return
        from rich.live import Live

        with Live(
            console=console(stderr=True), get_renderable=self.render, refresh_per_second=10, transient=False
        ) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None


@contextmanager
def transfer(name: str, total: int, doing: str = "uploading") -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal. Yield a function that advances it.

    After each piece, the calling code must call the function with the number of bytes in this piece. Without
    a terminal, the function does nothing.
    """
    if not console(stderr=True).is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{doing} {name}", total=total)
        yield lambda count: progress.advance(task, count)
