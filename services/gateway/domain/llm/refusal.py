"""Pass an engine's refusal of a request on to the caller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from tidegate.kernel.errors import BadRequest, TidegateError


class EngineRefused(TidegateError):
    """An HTTP error of an engine: the engine refused a request, or failed.

    ``status``: the engine's status, 400 to 599. ``detail``: the members of the error in the body.
    """

    reason = "engine_refused"

    def __init__(self, status: int, body: bytes, retry_after_s: float | None = None) -> None:
        self.status = status if 400 <= status <= 599 else 500
        self.detail = _detail(body)
        message = str(self.detail.get("message") or "the engine refused the request without a message")
        super().__init__(message, retry_after_s=retry_after_s)


def _detail(body: bytes) -> dict[str, Any]:
    """Return the error in a body: ``{"error": {...}}``, ``{"error": "..."}`` or ``{"message": ...}``."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {"message": body[:1000].decode("utf-8", "replace")}
    if not isinstance(document, dict):
        return {"message": str(document)[:1000]}
    error = document.get("error", document)
    if isinstance(error, dict):
        return error
    return {"message": str(error)}


def check_waits(body: Mapping[str, Any]) -> None:
    """Raise BadRequest for a request with ``background``.

    The engine would reply before it runs such a request, so the tokens would never be counted.
    """
    if body.get("background"):
        raise BadRequest(
            "'background' is not supported: leave it out, and send 'Prefer: respond-async' to get a job"
        )
