"""Split the output of a model and its Triton into lines, and bound how much of it is kept. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

# A longer line is cut, so that a model without line breaks stays readable and bounded.
LONGEST_LINE = 8 * 1024
# Seconds of the allowed pace that may come at once.
BURST_S = 16
# What a line counts beside its text: in the log it has a time, a level and names, 170 bytes of them.
LINE_BYTES = 64

Source = Literal["model", "triton"]

# Triton's own lines: level, date, time, pid, file and line. A Python model's `pb_utils.Logger` writes alike.
_TRITON = re.compile(
    r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<file>[^ :\]]+):\d+\](?: (?P<text>.*))?$"
)
_HEAD = re.compile(rb"^[IWEF]\d{4} \d\d:", re.MULTILINE)
# What a Triton without a GPU says at each start, and what the worker says itself, with the request's id.
_USUAL = re.compile(
    "pinned system memory|CudaDriverHelper|DCGM|^Error: Failed to initialize NVML|"
    'evhtp.c:.*NODELAY NOT SUPPORTED|^"?Failed to process the request'
)
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "error"}


class OutputLine(NamedTuple):
    """A line: whose it is, its level, and its text. ``raw`` is the line as it came.

    ``logged``: it belongs in the log of the Deployment.
    """

    source: Source
    level: str
    text: str
    raw: str
    logged: bool = True


class OutputReader:
    """Turn bytes, as they come, into whole lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._cut = False
        self._table = False

    def feed(self, data: bytes) -> list[OutputLine]:
        """Return the lines that are complete now."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = []
        for raw in whole:
            if self._cut:  # the rest of a line that was cut
                self._cut = False
                continue
            found.append(self._line(raw))
        if len(self._rest) > LONGEST_LINE:
            if not self._cut:
                found.append(self._line(self._rest))
            self._rest, self._cut = b"", True
        return found

    def skip(self, data: bytes) -> int | None:
        """Pass over bytes of a flood and return how many lines ended; None: they have to be read.

        Reading costs a microsecond a line, which the worker's requests would pay. Triton's lines are read.
        """
        end = data.rfind(b"\n")
        if end < 0 or _HEAD.search(data) is not None:
            return None
        self._rest, self._cut = data[end + 1 :], False
        return data.count(b"\n")

    def end(self) -> list[OutputLine]:
        """Return the last line, which has no end."""
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
        # Triton shows its models, backends and options as tables, behind a line without a text.
        self._table = self._table and (not text.strip() or text[0] in "+|")
        if self._table or _USUAL.search(text):
            return OutputLine("triton", "info", text, text, logged=False)
        return OutputLine("model", "info", text, text, logged=bool(text.strip()))


@dataclass(slots=True)
class Dropped:
    """Lines that were not kept, and their bytes."""

    lines: int = 0
    bytes: int = 0


class OutputLimit:
    """A limit of bytes per second of output, with a burst; the rest is dropped and counted."""

    def __init__(self, bytes_per_s: int) -> None:
        self._per_s = bytes_per_s
        self._left = self._most = float(bytes_per_s * BURST_S)
        self._at = 0.0
        self.dropped = Dropped()

    def take(self, size: int, now: float, more: int = 0) -> bool:
        """Return True if a line of ``size`` bytes is kept; ``now`` in seconds of any clock.

        ``more`` is what keeping it costs in addition.
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
        """Return True if less than half of ``size`` bytes would be kept."""
        return self._left + max(0.0, now - self._at) * self._per_s < size / 2

    def drop(self, lines: int, size: int) -> None:
        """Count lines that were not read."""
        self.dropped.lines += lines
        self.dropped.bytes += size

    def settled(self) -> Dropped | None:
        """Return what was dropped since the last call, or None."""
        if not self.dropped.lines:
            return None
        found, self.dropped = self.dropped, Dropped()
        return found
