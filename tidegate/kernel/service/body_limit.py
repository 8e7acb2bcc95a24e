"""Limit the body of an API request while it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.kernel import telemetry
from tidegate.kernel.errors import PayloadTooLarge, TidegateError
from tidegate.kernel.http.heads import number
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.service.error_answers import error_response

_BODY_HEADERS = (b"content-length", b"transfer-encoding")


class BodyLimit:
    """ASGI middleware that reads a request's whole body, up to a limit, and passes it on in one piece.

    ``larger``: other limits for some paths. A key is a regular expression for the path. A limit of None means
    that the route itself limits the body.
    """

    def __init__(self, app: ASGIApp, *, most: int, larger: Mapping[str, int | None]) -> None:
        self._app = app
        self._most = most
        self._larger = [(re.compile(path), limit) for path, limit in larger.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then call the app."""
        limit = self._limit(scope)
        if limit is None:
            await self._app(scope, receive, send)
            return
        try:
            body = await _read(scope, receive, limit)
        except TidegateError as refusal:
            await error_response(refusal, telemetry.request_id.get())(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _once(body, receive), send)

    def _limit(self, scope: Scope) -> int | None:
        """Return the limit of this request's body, or None if this middleware must not read it."""
        if scope["type"] != "http" or not any(name in _BODY_HEADERS for name, _ in scope["headers"]):
            return None
        for path, limit in self._larger:
            if path.fullmatch(scope["path"]):
                return limit
        return self._most


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """Return the whole body, or None if the caller disconnected.

    Raises PayloadTooLarge for a body that is larger than ``limit``, or that has too many JSON values.
    """
    if (_declared(scope) or 0) > limit:
        raise _too_large(limit)
    # Use one buffer instead of a list of parts. If a body arrives byte by byte, a list would have millions of
    # objects.
    body, more = bytearray(), True
    while more:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
    whole = bytes(body)
    bounded_json.check(whole, "the body")
    return whole


def _declared(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return number(value)
    return None


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than the {limit} bytes that this path accepts")


def _once(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` whose first call returns ``body``. Later calls go to the given ``receive``."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
