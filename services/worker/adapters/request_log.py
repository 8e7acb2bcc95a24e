"""Log failures of single requests at a limited rate, with the request id that the caller knows."""

from __future__ import annotations

import logging
import time
from typing import Any

from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, ModelFailed, PayloadTooLarge, TidegateError
from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.redaction import told
from tidegate.kernel.token_bucket import TokenBucket

log = telemetry.logger(__name__)

# This token bucket limits the log lines about requests. Without it, a model that fails each request could
# fill the disk.
_ALLOWED = TokenBucket(per_s=50, burst=500)


def log_request(level: int, event: str, request: Request, **more: Any) -> None:
    """Write a log line about a request, unless the limit of lines is reached."""
    now = time.monotonic()
    if not _ALLOWED.take(now):
        return
    if dropped := _ALLOWED.settled():
        log.warning("too many requests were logged; some lines were dropped", extra={"dropped": dropped})
    ids = {"request_id": telemetry.shown_id(request.trace), "request": request.id.hex()}
    log.log(level, event, extra=ids | more)


def log_failure(request: Request, error: TidegateError, **more: Any) -> TidegateError:
    """Log that a request failed. Return the error for the caller, without traceback and paths."""
    short, traceback = told(error.message)
    if traceback:
        more["traceback"] = traceback
    log_request(logging.WARNING, "request failed", request, reason=error.reason, problem=short, **more)
    if short != error.message and isinstance(error, ModelFailed | BadRequest | PayloadTooLarge):
        return type(error)(short, reason=error.reason, retry_after_s=error.retry_after_s)
    return error
