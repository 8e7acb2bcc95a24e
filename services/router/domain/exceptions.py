"""What the queue could not handle, and what its callers are told."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.protocol.envelope import REQUESTS, Buffer, Undecodable, unpack
from tidegate.protocol.jobs import ID_SIZE, read_id


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer for a caller: a reason (see ``tidegate.errors``) and a sentence."""

    reason: str
    message: str


EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
# What workers say; a message may say anything.
CAUSES = frozenset({EXHAUSTED, NOT_RETRIED, UNDECODABLE})

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


def job_of(told: object, body: Buffer) -> bytes | None:
    """The id of the job that a message is for: as its sender ``told`` it in hexadecimal digits, else the
    beginning of its frame, which may be there though the rest cannot be read; None: nobody knows.
    """
    if isinstance(told, str) and (named := read_id(told)) is not None:
        return named
    try:
        frames = unpack(REQUESTS, body)
    except Undecodable:
        return None
    return bytes(frames[0][:ID_SIZE]) if len(frames) == 1 and len(frames[0]) >= ID_SIZE else None
