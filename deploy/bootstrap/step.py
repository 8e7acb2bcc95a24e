"""A step of the bootstrap, and how it tells that it failed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Tell = Callable[[str], None]
"""Says in a few words what a step is doing now."""


class StepFailed(Exception):
    """A step failed: what happened, what to do about it, and the log that has the details."""

    def __init__(self, what: str, remedy: str, log: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.log = log


@dataclass(frozen=True)
class Step:
    """``done`` looks whether the result is there, quickly; ``work`` makes it. ``after`` names steps."""

    name: str
    title: str
    done: Callable[[], bool]
    work: Callable[[Tell], None]
    after: tuple[str, ...] = ()


def fingerprint(*parts: str | bytes) -> str:
    """One hash over everything that a step's result depends on."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def stamped(stamp: Path, value: str) -> bool:
    """True when the stamp was written for this value."""
    try:
        return stamp.read_text() == value
    except OSError:
        return False
