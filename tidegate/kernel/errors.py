"""The errors of Tidegate, by meaning.

A message says what was wrong and what was expected. Only ``tidegate.kernel.service`` and the ``api`` packages
translate an error to a status code. ``reason`` is the stable word that programs test for.
"""

from __future__ import annotations


class TidegateError(Exception):
    """The base of every error that a caller may see. ``message`` is one sentence for a person."""

    reason = "internal"
    request_id: str | None = None  # set by the client library
    deployment = ""  # for the log: the request's Deployment, if it is known

    # The caller's timeout in seconds, if this timeout ended the request; otherwise 0.
    cut_after_s = 0.0

    def __init__(
        self, message: str, *, reason: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or type(self).reason
        self.retry_after_s = retry_after_s


class BadRequest(TidegateError):
    """The request is wrong: its shape, its names or its values."""

    reason = "bad_request"


class Unauthorized(TidegateError):
    """The credential is missing or unknown."""

    reason = "unauthorized"


class Forbidden(TidegateError):
    """The caller is known but may not do this."""

    reason = "forbidden"


class NotFound(TidegateError):
    """The named object does not exist."""

    reason = "not_found"


class MethodNotAllowed(TidegateError):
    """The URL path does not accept this HTTP method. ``allowed``: the methods that it accepts."""

    reason = "method_not_allowed"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after_s: float | None = None,
        allowed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)
        self.allowed = allowed


class Conflict(TidegateError):
    """The named object exists already, is in use, or has changed since the caller read it."""

    reason = "conflict"


class PreconditionFailed(Conflict):
    """The object does not meet the request's condition ``If-Match`` or ``If-None-Match``."""

    reason = "precondition_failed"


class SequenceLost(TidegateError):
    """The state of a sequence was lost with its replica. The caller must start the sequence again."""

    reason = "sequence_lost"


class PayloadTooLarge(TidegateError):
    """The payload exceeds the stated limit."""

    reason = "payload_too_large"


class TooMany(TidegateError):
    """The caller is at a limit: its rate, its concurrent requests, or its quota.

    ``headers``: the response headers that describe the limits.
    """

    reason = "too_many_requests"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, retry_after_s=retry_after_s)
        self.headers = headers or {}


class Overloaded(TidegateError):
    """More requests wait than can be answered in time. ``retry_after_s``: retry after this many seconds."""

    reason = "overloaded"


class NoCapacity(TidegateError):
    """No replica runs the model, and no replica may be started."""

    reason = "no_capacity"


class ColdStart(TidegateError):
    """No replica runs the model yet, and a cold start takes longer than the request can wait."""

    reason = "cold_start"


class NoRoutes(TidegateError):
    """This gateway has not received a route table yet."""

    reason = "no_routes"


class DeadlinePassed(TidegateError):
    """The request's deadline passed before its answer was ready."""

    reason = "deadline_passed"


class ModelFailed(TidegateError):
    """The model failed in a call or while it was loaded. The message comes from the model server."""

    reason = "model_failed"


class Unavailable(TidegateError):
    """A part of the system does not answer now: the broker, a store or the model server."""

    reason = "unavailable"


class UpstreamUnavailable(Unavailable):
    """The upstream of a Deployment cannot answer now. Another target of the endpoint may answer."""

    reason = "upstream_unavailable"


class WorkerLost(Unavailable):
    """The worker of a stream was lost after it sent a part of the stream. The rest is missing."""

    reason = "worker_lost"


BY_REASON: dict[str, type[TidegateError]] = {
    cls.reason: cls
    for cls in (
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        Conflict,
        PreconditionFailed,
        SequenceLost,
        PayloadTooLarge,
        TooMany,
        Overloaded,
        NoCapacity,
        ColdStart,
        NoRoutes,
        DeadlinePassed,
        ModelFailed,
        Unavailable,
    )
}


def whole_seconds(retry_after_s: float) -> int:
    """Return the value of the header ``Retry-After``: whole seconds, rounded up, at least 1."""
    return max(1, int(-(-retry_after_s // 1)))
