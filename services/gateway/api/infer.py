"""Inference as plain ASGI, in front of the FastAPI app, which has everything else.

It serves what the direct way (``direct.py``) leaves to it: pipelined requests, and any ASGI server.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.api.inference import Headers, Inference, Response


class CallerGone(Exception):
    """The client closed the connection before its request was complete."""


class InferDoor:
    """Takes inference calls out of the stream of requests; passes all others on."""

    def __init__(self, app: ASGIApp, inference: Inference) -> None:
        self._app = app
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        target = self._inference.target(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if target is None:
            await self._app(scope, receive, send)
            return
        headers: Headers = dict(scope["headers"])
        try:
            body = await self._read(receive)
        except CallerGone:
            return
        if body is None:
            response = self._inference.too_large(target, headers)
        else:
            response = await self._infer(target, headers, body)
        await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
        await send({"type": "http.response.body", "body": response.body})

    async def _infer(self, target: str, headers: Headers, body: bytes) -> Response:
        future: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        def done(response: Response) -> None:
            if not future.done():
                future.set_result(response)

        id_ = self._inference.begin(target, headers, body, done)
        try:
            return await future
        except asyncio.CancelledError:
            if id_ is not None:
                self._inference.abandon(id_, target)
            raise

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None when it is over the limit."""
        chunks, size, more = [], 0, True
        while more:
            message: Message = await receive()
            if message["type"] == "http.disconnect":
                raise CallerGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._inference.max_body_bytes:
                return None
            more = message.get("more_body", False)
        return b"".join(chunks)
