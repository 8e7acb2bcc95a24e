"""Answer errors over HTTP: the status code of each error, and its JSON body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

from tidegate.kernel import errors, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import error_body
from tidegate.kernel.protocol.redaction import for_caller

log = telemetry.logger(__name__)

STATUS: dict[type[TidegateError], int] = {
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.SequenceLost: 409,
    errors.PayloadTooLarge: 413,
    errors.TooMany: 429,
    errors.ModelFailed: 500,
    errors.Overloaded: 503,
    errors.NoCapacity: 503,
    errors.ColdStart: 503,
    errors.NoRoutes: 503,
    errors.Unavailable: 503,
    errors.DeadlinePassed: 504,
}


def status_of(error: TidegateError) -> int:
    """Return the HTTP status code of an error, from its nearest base class that has one; else 500."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)


def error_response(error: TidegateError, rid: str) -> Response:
    """Return an error as an HTTP answer, with ``Retry-After`` in whole seconds if the error has one."""
    message, headers = for_caller(error), {}
    if message != error.message:
        log.warning(
            "paths were removed from an error answer", extra={"problem": error.message, "request_id": rid}
        )
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(errors.whole_seconds(error.retry_after_s))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.MethodNotAllowed) and error.allowed:
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.TooMany):
        headers |= error.headers
    return json_answer(error_body(message, error.reason, rid), status_of(error), headers)


def internal_error(rid: str) -> Response:
    """Return the answer for an unexpected error."""
    return json_answer(error_body("Internal error; see the log of the service.", "internal", rid), 500)


def json_answer(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")
