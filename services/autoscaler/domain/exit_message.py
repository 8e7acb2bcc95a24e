"""Describe how a worker ended, with its last log line."""

from __future__ import annotations

import json
import signal

LONGEST = 500


def describe_exit(code: int | None) -> str:
    """Describe the exit code of a worker in words.

    ``code``: negative for a signal; None if the code is not known.
    """
    if code is None:
        return "the worker's process has ended"
    if code < 0:
        return f"the worker was ended by {_signal_name(-code)}"
    return f"the worker exited with code {code}"


def with_last_log_line(exit_text: str, output: str) -> str:
    """Append the last line of the worker's output, if there is one, to ``exit_text``."""
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    return f"{exit_text}; last log line: {_plain(lines[-1])[:LONGEST]}" if lines else exit_text


def _plain(line: str) -> str:
    """Return the message of a line of the JSON log. Return any other line unchanged."""
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
