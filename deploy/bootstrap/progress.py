"""Show the steps: as a live list on a terminal, otherwise as plain lines."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from typing import Protocol

REPORT_EVERY_S = 10.0
FRAME_S = 0.12
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Progress(Protocol):
    """Shows the steps to the user. The installer calls a method at each change."""

    def started(self, name: str) -> None: ...
    def doing(self, name: str, detail: str) -> None: ...
    def finished(self, name: str, *, ok: bool) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Line:
    title: str
    state: str = "waiting"
    began: float = 0.0
    took: float = 0.0
    detail: str = ""
    reported: float = 0.0


class Plain:
    """Prints a line when a step starts and a line when it ends.

    In between, it prints the step's progress at most every 10 s.
    """

    def __init__(self, titles: dict[str, str]) -> None:
        self._lines = {name: _Line(title) for name, title in titles.items()}
        self._lock = threading.Lock()

    def started(self, name: str) -> None:
        line = self._lines[name]
        line.began = line.reported = time.monotonic()
        self._print(f"  ..  {line.title}")

    def doing(self, name: str, detail: str) -> None:
        line, now = self._lines[name], time.monotonic()
        if now - line.reported >= REPORT_EVERY_S:
            line.reported = now
            self._print(f"  ..  {line.title}: {detail} ({now - line.began:.0f} s)")

    def finished(self, name: str, *, ok: bool) -> None:
        line = self._lines[name]
        self._print(f"  {'ok' if ok else 'FAILED'}  {line.title} ({time.monotonic() - line.began:.1f} s)")

    def close(self) -> None:
        """Do nothing, because each printed line is final."""

    def _print(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)


class Live:
    """Shows a list of all steps with their times, and redraws it in place."""

    def __init__(self, titles: dict[str, str]) -> None:
        self._lines = {name: _Line(title) for name, title in titles.items()}
        self._drawn = 0
        self._closing = threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)
        self._painter.start()

    def started(self, name: str) -> None:
        line = self._lines[name]
        line.began, line.state = time.monotonic(), "running"

    def doing(self, name: str, detail: str) -> None:
        self._lines[name].detail = detail

    def finished(self, name: str, *, ok: bool) -> None:
        line = self._lines[name]
        line.took, line.state = time.monotonic() - line.began, "ok" if ok else "failed"

    def close(self) -> None:
        """Draw the last state and leave the cursor below it."""
        self._closing.set()
        self._painter.join()
        self._draw(0)

    def _paint(self) -> None:
        frame = 0
        while not self._closing.wait(FRAME_S):
            frame += 1
            self._draw(frame)

    def _draw(self, frame: int) -> None:
        width = shutil.get_terminal_size().columns - 1
        rows = [_row(line, frame)[:width] for line in self._lines.values()]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        sys.stdout.write(up + "".join(f"\x1b[2K{row}\n" for row in rows))
        sys.stdout.flush()
        self._drawn = len(rows)


def _row(line: _Line, frame: int) -> str:
    match line.state:
        case "waiting":
            return f"    {line.title}"
        case "running":
            elapsed = time.monotonic() - line.began
            return f"  {SPINNER[frame % len(SPINNER)]} {line.title:<34} {elapsed:5.1f} s  {line.detail}"
        case "ok":
            return f"  ✓ {line.title:<34} {line.took:5.1f} s"
        case _:
            return f"  ✗ {line.title:<34} {line.took:5.1f} s"


def for_output(titles: dict[str, str]) -> Progress:
    """Return the live list if standard output is a terminal that can show it; otherwise plain lines."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    live = sys.stdout.isatty() and utf8 and os.environ.get("TERM", "dumb") != "dumb"
    return Live(titles) if live else Plain(titles)
