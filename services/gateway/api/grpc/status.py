"""Translate errors to gRPC status codes, details and trailers."""

from __future__ import annotations

from typing import Any

from grpc import StatusCode

from tidegate.kernel import errors
from tidegate.kernel.errors import TidegateError, whole_seconds
from tidegate.kernel.protocol.redaction import for_caller

CODES: dict[type[TidegateError], StatusCode] = {
    errors.BadRequest: StatusCode.INVALID_ARGUMENT,
    errors.Unauthorized: StatusCode.UNAUTHENTICATED,
    errors.Forbidden: StatusCode.PERMISSION_DENIED,
    errors.NotFound: StatusCode.NOT_FOUND,
    errors.MethodNotAllowed: StatusCode.UNIMPLEMENTED,
    errors.Conflict: StatusCode.ABORTED,
    errors.SequenceLost: StatusCode.ABORTED,
    errors.PayloadTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.TooMany: StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: StatusCode.UNAVAILABLE,
    errors.NoCapacity: StatusCode.UNAVAILABLE,
    errors.ColdStart: StatusCode.UNAVAILABLE,
    errors.NoRoutes: StatusCode.UNAVAILABLE,
    errors.Unavailable: StatusCode.UNAVAILABLE,
    errors.DeadlinePassed: StatusCode.DEADLINE_EXCEEDED,
    errors.ModelFailed: StatusCode.INTERNAL,
}
# The most bytes of an error's message. It is sent in the trailers, and many clients accept only 8 KiB of
# trailers.
DETAILS_BYTES = 4096

Metadata = tuple[tuple[str, str], ...]


def code_of(error: TidegateError) -> StatusCode:
    """Return the status code of an error's class, or of its nearest base class that has a code."""
    return next((CODES[cls] for cls in type(error).__mro__ if cls in CODES), StatusCode.INTERNAL)


def details_of(error: TidegateError) -> str:
    """Return the message of an error, cut to ``DETAILS_BYTES``."""
    message = for_caller(error)
    if len(message) <= DETAILS_BYTES // 4:
        return message
    return message.encode()[:DETAILS_BYTES].decode(errors="ignore")


def trailers_of(error: TidegateError, rid: str) -> Metadata:
    """Return the trailers of an error.

    They are the reason, the request id, ``retry-after`` in whole seconds if the error has it, and the limits
    of the caller's key if one is reached.
    """
    trailers: Metadata = (("reason", error.reason), ("x-request-id", rid))
    if error.retry_after_s is not None:
        trailers += (("retry-after", str(whole_seconds(error.retry_after_s))),)
    if isinstance(error, errors.TooMany):
        trailers += tuple((name.lower(), value) for name, value in error.headers.items())
    return trailers


def percent(text: str) -> str:
    """Return a message in the percent-encoding that the trailer ``grpc-message`` requires."""
    if text.isascii() and text.isprintable() and "%" not in text:
        return text
    return "".join(
        chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in text.encode()
    )


async def refuse(context: Any, error: TidegateError, rid: str, more: Metadata = ()) -> None:
    """End the call with an error. ``more``: additional trailers."""
    await context.abort(code_of(error), details_of(error), trailers_of(error, rid) + more)
