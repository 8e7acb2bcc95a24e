"""How a worker ended, in words, and the last thing it said."""

from __future__ import annotations

import json
import signal

LONGEST = 500


def describe_exit(code: int | None) -> str:
    """An exit code (negative: a signal; None: not known) as a clause."""
    if code is None:
        return "the worker's process is gone"
    if code < 0:
        return f"the worker was ended by {_signal_name(-code)}"
    return f"the worker exited with code {code}"


def with_last_log_line(how: str, output: str) -> str:
    """``how``, and the last line of the worker's output, if there is one."""
    said = [line.strip() for line in output.split("\n") if line.strip()]
    return f"{how}; last log line: {_plain(said[-1])[:LONGEST]}" if said else how


def _plain(line: str) -> str:
    """A line of our own JSON log as people read it; any other line as it is."""
    try:
        record = json.loads(line)
        return ": ".join(str(record[key]) for key in ("message", "problem") if key in record) or line
    except (ValueError, TypeError):
        return line


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
