"""The reasons for giving up requests and jobs, and the errors for their callers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.envelope import REQUESTS, Buffer, Undecodable, unpack
from tidegate.kernel.protocol.jobs import ID_SIZE, read_id


@dataclass(frozen=True, slots=True)
class CallerError:
    """The error for a caller: a reason (see ``tidegate.kernel.errors``) and a sentence."""

    reason: str
    message: str


EXHAUSTED = "attempts_exhausted"
NOT_RETRIED = "not_retried"
UNDECODABLE = "undecodable"
# The causes that workers give for a dead letter. Other senders may give any text as the cause.
CAUSES = frozenset({EXHAUSTED, NOT_RETRIED, UNDECODABLE})

MAX_LOSS_LENGTH = 200


def caller_error(cause: str, loss: str = "") -> CallerError | None:
    """Return the error for the caller of a request that was given up; None if the caller is unknown.

    The caller is unknown if the request cannot be decoded. ``loss``: how the worker describes the end of the
    model's process.
    """
    if cause == UNDECODABLE:
        return None
    lost = loss[:MAX_LOSS_LENGTH] or "the worker died"
    if cause == EXHAUSTED:
        kept = "the request is kept as a dead letter and not retried"
        return CallerError("model_failed", f"{lost} each time that this request ran; {kept}")
    if cause == NOT_RETRIED:
        policy = "the Deployment has retry: never"
        return CallerError("model_failed", f"{lost} while this request ran, and {policy}")
    return CallerError("unavailable", f"the request could not be handled: {cause}")


def job_of(header: object, body: Buffer) -> bytes | None:
    """Return the id of a message's job, or None if it is unknown.

    ``header`` has the id in hexadecimal digits. Without the header, the id is read from the beginning of the
    frame, which may be intact even if the rest cannot be decoded.
    """
    if isinstance(header, str) and (id_ := read_id(header)) is not None:
        return id_
    try:
        frames = unpack(REQUESTS, body)
    except Undecodable:
        return None
    return bytes(frames[0][:ID_SIZE]) if len(frames) == 1 and len(frames[0]) >= ID_SIZE else None
