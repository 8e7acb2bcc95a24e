"""The errors that a client raises. The ``reason`` of an answer selects a class of ``tidegate.kernel.errors``.

``error.request_id`` is the request id of the answer. Tracebacks show it as a note of the error.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from tidegate.kernel.errors import (
    BY_REASON,
    BadRequest,
    Conflict,
    DeadlinePassed,
    Forbidden,
    ModelFailed,
    NoCapacity,
    NoRoutes,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    PreconditionFailed,
    SequenceLost,
    TidegateError,
    TooMany,
    Unauthorized,
    Unavailable,
)

__all__ = [
    "BadAnswer",
    "BadRequest",
    "Conflict",
    "DeadlinePassed",
    "Forbidden",
    "ModelFailed",
    "NoCapacity",
    "NoRoutes",
    "NotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PreconditionFailed",
    "SequenceLost",
    "TidegateError",
    "TooMany",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "from_answer",
    "from_openai",
    "request_id_of",
]

_NOTE = "request id: "


class Unreachable(Unavailable):
    """The error if no server listens at the address, or if the connection broke before the answer."""

    reason = "unreachable"


class BadAnswer(TidegateError):
    """The error if an answer does not follow the protocol. Perhaps the URL is wrong."""

    reason = "bad_answer"


_BY_STATUS: dict[int, type[TidegateError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: PayloadTooLarge,
    422: BadRequest,
    429: TooMany,
    500: TidegateError,
    502: Unavailable,
    503: Unavailable,
    504: DeadlinePassed,
}

# The error class for each type and code of OpenAI's errors. It is needed for an error inside a stream,
# because such an error has no HTTP status.
_BY_TYPE: dict[str, type[TidegateError]] = {
    "invalid_request_error": BadRequest,
    "authentication_error": Unauthorized,
    "permission_error": Forbidden,
    "not_found_error": NotFound,
    "rate_limit_error": TooMany,
    "requests": TooMany,
    "tokens": TooMany,
    "insufficient_quota": TooMany,
    "overloaded_error": Overloaded,
    "timeout_error": DeadlinePassed,
    "unavailable_error": Unavailable,
    # The keys below are codes of OpenAI's errors. A code is more precise than a type.
    "timeout": DeadlinePassed,
    "model_not_found": NotFound,
}


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> TidegateError:
    """Return the error for an answer with a status of 400 or more.

    ``headers`` must be case-insensitive or lower-case. The answer's reason selects the class. If this client
    does not know the reason, the status selects the class. The error's ``retry_after_s`` has the value of the
    header ``Retry-After``.
    """
    if body.lstrip().startswith(b"<"):
        # The gateway never sends an error as a web page, so another server or a proxy has answered.
        kind = BadAnswer if status < 500 else _BY_STATUS.get(status, TidegateError)
        return kind(f"The answer was {status} with a web page: is this the URL of a Tidegate service?")
    message, reason, rid = _read(body)
    kind = BY_REASON.get(reason) or _BY_STATUS.get(status, TidegateError)
    error = kind(
        message or f"The answer was {status} without a reason: is this the URL of a Tidegate service?",
        reason=reason or None,
        retry_after_s=_seconds(headers.get("retry-after")),
    )
    if rid := rid or headers.get("x-request-id", ""):
        error.request_id = rid
        if hasattr(error, "add_note"):  # `add_note` exists from Python 3.11 on
            error.add_note(_NOTE + rid)
    return error


def from_document(document: Mapping[str, object]) -> TidegateError:
    """Return the error that a JSON object states.

    The object is an event of a stream, or the error in a line of a batch's results.
    """
    reason = str(document.get("reason") or "")
    kind = BY_REASON.get(reason, TidegateError)
    message = document.get("error") or document.get("message") or "The answer was an error without a reason."
    error = kind(str(message), reason=reason or None)
    error.request_id = str(document.get("request_id") or "") or None
    return error


def from_openai(document: Mapping[str, object]) -> TidegateError:
    """Return the error in an event of OpenAI's API: ``{"error": {"message", "type", "code"}}``."""
    message, reason, rid = _members(document)
    told = document["error"] if isinstance(document["error"], dict) else {}
    code, kind = told.get("code"), BY_REASON.get(reason)
    if kind is None and isinstance(code, int):
        kind = _BY_STATUS.get(code)
    found = kind or _BY_TYPE.get(str(code)) or _BY_TYPE.get(str(told.get("type")), ModelFailed)
    error = found(message or "The answer ended with an error without a reason.", reason=reason or None)
    error.request_id = rid or None
    return error


def request_id_of(error: BaseException) -> str | None:
    """Return the id of the request that failed, or None if the id is unknown.

    The services' logs contain this id, too.
    """
    return error.request_id if isinstance(error, TidegateError) else None


def _read(body: bytes) -> tuple[str, str, str]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        return body[:500].decode("utf-8", "replace").strip(), "", ""
    return _members(data)


def _members(data: Mapping[str, object]) -> tuple[str, str, str]:
    """Return message, reason and request id of an error in Tidegate's or in OpenAI's shape."""
    message = data.get("error") or data.get("detail") or ""
    reason, rid = data.get("reason"), data.get("request_id")
    if isinstance(message, dict):
        told = message
        message = told.get("message") or ""
        rid = rid or told.get("request_id")
        code = told.get("code")
        reason = reason or told.get("reason") or (code if isinstance(code, str) else "")
    return str(message), str(reason or ""), str(rid or "")


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value is not None else None
    except ValueError:
        return None  # an HTTP date, which the gateway never sends
