"""The error of a benchmark that a user can do something about."""

from __future__ import annotations


class BenchmarkFailed(Exception):
    """A benchmark cannot continue. ``str()`` is a complete message for the user."""
