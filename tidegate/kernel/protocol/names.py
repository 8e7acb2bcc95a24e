"""Check the names of models, Deployments and Endpoints, by the rules of Triton and KServe. Pure."""

from __future__ import annotations

import re

LONGEST = 63
PATTERN = rf"^[A-Za-z0-9]([A-Za-z0-9._-]{{0,{LONGEST - 2}}}[A-Za-z0-9_])?$"
RULE = (
    f"use 1 to {LONGEST} letters (A-Z, a-z), digits, '_', '-' and '.'; the first must be a letter or a "
    "digit, and the last must be a letter, a digit or '_'"
)
# A model of this name would hide ``GET /v2/models/stats``, Triton's route for the statistics of every model.
RESERVED = frozenset({"stats"})
_NAME = re.compile(PATTERN)


def problem(kind: str, name: str) -> str | None:
    """Return why ``name`` cannot be the name of a ``kind``, as a sentence; None: it can."""
    # Use fullmatch, because `$` would accept a trailing newline.
    if not _NAME.fullmatch(name):
        return f"{name[:80]!r} is not a valid name of a {kind}: {RULE}."
    if name in RESERVED:
        return f"{name!r} cannot be the name of a {kind}: GET /v2/models/{name} is another route."
    return None


def fitting(text: str) -> str:
    """Turn ``text`` into a valid name. Return an empty string if no valid character is left."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    found = re.sub(r"^[^A-Za-z0-9]+", "", found)[:LONGEST]
    return found.rstrip("-.")


def same_but_for_case(name: str, others: frozenset[str] | set[str]) -> str | None:
    """Return a name of ``others`` that differs from ``name`` only in case, or None.

    Systems that ignore case, such as DNS, cannot tell two such names apart.
    """
    if name in others:
        return None
    folded = name.lower()
    return next((other for other in sorted(others) if other.lower() == folded), None)
