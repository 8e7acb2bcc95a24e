"""What can go wrong with a benchmark so that a user can do something about it."""

from __future__ import annotations


class BenchmarkFailed(Exception):
    """A benchmark cannot go on; ``str()`` is complete text for a person."""
