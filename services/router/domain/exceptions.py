"""What the queue could not handle, and what its callers are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for a caller: a reason (see ``tidegate.errors``) and a sentence."""

    reason: str
    message: str


EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"

_VERDICTS = {
    EXHAUSTED: Verdict(
        "model_failed",
        "the worker died each time it ran this request; it is kept as a dead letter and not tried again",
    ),
    NOT_RETRIED: Verdict(
        "model_failed", "the worker died while it ran this request, and its deployment says retry: never"
    ),
}


def verdict(cause: str) -> Verdict | None:
    """What to tell the caller of a request that ended for ``cause``; None: nobody can be told."""
    if cause == UNDECODABLE:
        return None
    return _VERDICTS.get(cause, Verdict("unavailable", f"the request could not be handled: {cause}"))


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A request that was given up. ``at`` is seconds since the epoch; sizes in bytes."""

    at: float
    cause: str
    queue: str
    id: str
    attempt: int
    size: int
    trace: str

    def shown(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}
