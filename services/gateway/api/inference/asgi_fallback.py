"""The fallback for inference calls: plain ASGI, in front of the FastAPI app.

It serves the calls that the hot path (``hot_path.py``) does not handle, such as pipelined requests. It also
works in other ASGI servers.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api.body_limits import Body, Headers
from services.gateway.api.compression import HttpResponse
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.request_target import Target, target_of
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.service.guard import without_slash


class CallerGone(Exception):
    """The client closed the connection before its request was complete."""


class AsgiFallback:
    """An ASGI app that answers inference calls and passes all other requests to ``app``."""

    def __init__(self, app: ASGIApp, inference: InferenceHandler) -> None:
        self.app = app
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        target = None
        if scope["type"] == "http":
            target = target_of(scope["method"], without_slash(scope["path"]))
        if target is None:
            await self.app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        refusal = self._inference.check_headers(headers)  # this check caches the credential for ``knows``
        body = Body(self._inference.limits, known=self._inference.knows(headers))
        try:
            if refusal is None:
                refusal = await self._read(receive, body)
            if refusal is not None:
                response = self._inference.refuse(target, headers, refusal)
            else:
                response = await self._infer(target, headers, body.whole())
        except CallerGone:
            return
        finally:
            body.release()
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        for piece in (response.body, *response.tail[:-1]):
            await send({"type": "http.response.body", "body": bytes(piece), "more_body": bool(response.tail)})
        for piece in response.tail[-1:]:
            await send({"type": "http.response.body", "body": bytes(piece)})

    async def _infer(self, target: Target, headers: Headers, body: Buffer) -> HttpResponse:
        future: asyncio.Future[HttpResponse] = asyncio.get_running_loop().create_future()

        def done(response: HttpResponse) -> None:
            if not future.done():
                future.set_result(response)

        id_ = self._inference.begin(target, headers, body, done)
        try:
            return await future
        except asyncio.CancelledError:
            if id_ is not None:
                self._inference.abandon(id_, target, headers)
            raise

    async def _read(self, receive: Receive, body: Body) -> TidegateError | None:
        """Read the whole body. Return the error if the body is refused, else None."""
        refusal, more = None, True
        while more and refusal is None:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            refusal = body.add(message.get("body", b""))
            more = message.get("more_body", False)
        return refusal
