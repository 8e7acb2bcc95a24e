"""A step of the bootstrap, and the error that a failed step raises."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Report = Callable[[str], None]
"""Takes a few words about what a step is doing now."""


class StepFailed(Exception):
    """A failed step: what happened, what to do about it, and the log with the details."""

    def __init__(self, what: str, remedy: str, log: Path | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.log = log


@dataclass(frozen=True)
class Step:
    """One step. ``done`` quickly checks if the step is done. ``work`` runs the step.

    ``after`` names the steps that must be done first.
    """

    name: str
    title: str
    done: Callable[[], bool]
    work: Callable[[Report], None]
    after: tuple[str, ...] = ()


def fingerprint(*parts: str | bytes) -> str:
    """Return one hash of all ``parts``, the inputs of a step."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def stamped(stamp: Path, value: str) -> bool:
    """Return True if the file ``stamp`` contains exactly ``value``."""
    try:
        return stamp.read_text() == value
    except OSError:
        return False
