"""What the queue could not handle, and what its callers are told."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.envelope import REQUESTS, Buffer, Undecodable, unpack
from tidegate.kernel.protocol.jobs import ID_SIZE, read_id


@dataclass(frozen=True, slots=True)
class CallerError:
    """The answer for a caller: a reason (see ``tidegate.kernel.errors``) and a sentence."""

    reason: str
    message: str


EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
# What workers say; a message may say anything.
CAUSES = frozenset({EXHAUSTED, NOT_RETRIED, UNDECODABLE})

LONGEST_LOSS = 200


def caller_error(cause: str, loss: str = "") -> CallerError | None:
    """What to tell the caller of a request that ended for ``cause``; None: nobody can be told.

    ``loss`` is what the worker says of the model's end.
    """
    if cause == UNDECODABLE:
        return None
    lost = loss[:LONGEST_LOSS] or "the worker died"
    if cause == EXHAUSTED:
        kept = "it is kept as a dead letter and not tried again"
        return CallerError("model_failed", f"{lost} each time that this request ran; {kept}")
    if cause == NOT_RETRIED:
        policy = "its deployment says retry: never"
        return CallerError("model_failed", f"{lost} while this request ran, and {policy}")
    return CallerError("unavailable", f"the request could not be handled: {cause}")


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
