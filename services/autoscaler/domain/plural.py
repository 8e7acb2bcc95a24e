"""Format a number with its noun in singular or plural."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return ``1 failed start``, ``2 failed starts``; ``noun`` is the singular."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
