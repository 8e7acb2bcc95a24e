"""Format a number with its noun in singular or plural."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return text such as ``1 failed start`` or ``2 failed starts``; ``noun`` is the singular."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
