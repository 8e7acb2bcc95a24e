"""Split the output of a model and its Triton into lines, and limit the bytes that are logged."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

# The most bytes of a line. A longer line is cut, so that output without line breaks stays readable and needs
# little memory.
LONGEST_LINE = 8 * 1024
# An ``OutputLimit`` allows a number of bytes per second. A burst may use the bytes of this many seconds.
BURST_S = 16
# The number of bytes that is added to the size of each line, for its time, level and names in the log.
LINE_BYTES = 64

Source = Literal["model", "triton"]

# Triton's lines have level, date, time, pid, file and line. `pb_utils.Logger` uses the same format.
_TRITON = re.compile(
    r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<file>[^ :\]]+):\d+\](?: (?P<text>.*))?$"
)
_HEAD = re.compile(rb"^[IWEF]\d{4} \d\d:", re.MULTILINE)
# Lines that are not logged. Triton writes some of them at each start without a GPU. It writes others for
# failed requests, which the worker logs itself.
_USUAL = re.compile(
    "pinned system memory|CudaDriverHelper|DCGM|^Error: Failed to initialize NVML|"
    'evhtp.c:.*NODELAY NOT SUPPORTED|^"?Failed to process the request'
)
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}


class OutputLine(NamedTuple):
    """A line of output.

    ``raw``: the line as it was printed; the end of a line longer than ``LONGEST_LINE`` is cut off. ``text``:
    the message in the line. ``logged``: True if the line goes to the Deployment's log.
    """

    source: Source
    level: str
    text: str
    raw: str
    logged: bool = True


class OutputReader:
    """A reader that splits bytes into whole lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._cut = False
        self._table = False

    def feed(self, data: bytes) -> list[OutputLine]:
        """Add bytes and return the lines that are now complete."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = []
        for raw in whole:
            if self._cut:  # the rest of a line that was cut is dropped
                self._cut = False
                continue
            found.append(self._line(raw))
        if len(self._rest) > LONGEST_LINE:
            if not self._cut:
                found.append(self._line(self._rest))
            self._rest, self._cut = b"", True
        return found

    def skip(self, data: bytes) -> int | None:
        """Skip bytes without reading their lines. Return how many lines end in these bytes.

        Reading takes a microsecond per line, so a flood of lines would delay the worker's requests. Nothing
        is skipped if the bytes contain a line of Triton, or if they contain no line break. Then the result is
        None, and the calling code must pass the bytes to :meth:`feed`.
        """
        end = data.rfind(b"\n")
        if end < 0 or _HEAD.search(data) is not None:
            return None
        self._rest, self._cut = data[end + 1 :], False
        return data.count(b"\n")

    def end(self) -> list[OutputLine]:
        """Return what is left of the output: one line without a line break, or nothing."""
        rest, self._rest = self._rest, b""
        return [self._line(rest)] if rest and not self._cut else []

    def _line(self, raw: bytes) -> OutputLine:
        text = raw[:LONGEST_LINE].decode(errors="replace").rstrip("\r")
        if len(raw) > LONGEST_LINE:
            text += " ... (cut: the line is longer than 8 KiB)"
        found = _TRITON.match(text)
        if found is not None:
            level, text_of_triton = _LEVELS[found["level"]], (found["text"] or "").strip()
            if found["file"].endswith(".py"):
                return OutputLine("model", level, text_of_triton.strip('"'), text)
            self._table = not text_of_triton
            logged = level != "info" and bool(text_of_triton) and _USUAL.search(text_of_triton) is None
            return OutputLine("triton", level, text_of_triton, text, logged)
        # Triton prints its models, backends and options as tables, after a line without text.
        self._table = self._table and (not text.strip() or text[0] in "+|")
        if self._table or _USUAL.search(text):
            return OutputLine("triton", "info", text, text, logged=False)
        return OutputLine("model", "info", text, text, logged=bool(text.strip()))


@dataclass(slots=True)
class Dropped:
    """The numbers of dropped lines and dropped bytes."""

    lines: int = 0
    bytes: int = 0


class OutputLimit:
    """A limit of logged output in bytes per second. It allows a burst, and counts the dropped lines."""

    def __init__(self, bytes_per_s: int) -> None:
        self._per_s = bytes_per_s
        self._left = self._most = float(bytes_per_s * BURST_S)
        self._at = 0.0
        self.dropped = Dropped()

    def take(self, size: int, now: float, more: int = 0) -> bool:
        """Return True if a line of ``size`` bytes is within the limit. Otherwise count it as dropped.

        ``now``: seconds of any clock. ``more``: bytes that the line takes in the log in addition to ``size``.
        """
        self._left = min(self._most, self._left + max(0.0, now - self._at) * self._per_s)
        self._at = now
        if self._left < size + more:
            self.dropped.lines += 1
            self.dropped.bytes += size
            return False
        self._left -= size + more
        return True

    def exhausted(self, size: int, now: float) -> bool:
        """Return True if, at the time ``now``, the limit allows less than half of ``size`` bytes."""
        return self._left + max(0.0, now - self._at) * self._per_s < size / 2

    def drop(self, lines: int, size: int) -> None:
        """Count lines, and their size in bytes, as dropped."""
        self.dropped.lines += lines
        self.dropped.bytes += size

    def settled(self) -> Dropped | None:
        """Return what was dropped since this method was last called; None if nothing was dropped."""
        if not self.dropped.lines:
            return None
        found, self.dropped = self.dropped, Dropped()
        return found
