"""A real uvicorn on a real socket with the protocol of all services, and an app that records its requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import uvicorn

from tests.conftest import PATIENCE_S
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.http.timeouts import HttpLimits


class Recorder:
    """An ASGI app that keeps its requests, and answers with them as JSON."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Record the request and answer."""
        if scope["type"] == "lifespan":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.seen.append({"path": scope["path"], "gone": True})
                return
            body += message["body"]
            more = message["more_body"]
        told = {
            "method": scope["method"],
            "path": scope["path"],
            "body": body.decode("latin-1"),
            "headers": [[n.decode("latin-1"), v.decode("latin-1")] for n, v in scope["headers"]],
        }
        self.seen.append(told)
        await self.gate.wait()
        answer = json.dumps(told).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


class Server:
    """The running server."""

    def __init__(self, app: Recorder, connections: Connections, port: int) -> None:
        self.app = app
        self.connections = connections
        self.port = port

    async def exchange(self, *pieces: bytes, pause_s: float = 0.0) -> bytes:
        """Send each piece in its own write, then the end. Return everything that comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
            async with asyncio.timeout(PATIENCE_S):
                return await reader.read()
        finally:
            writer.transport.abort()


@asynccontextmanager
async def serving(limits: HttpLimits | None = None, *, fit_files: bool = False) -> AsyncIterator[Server]:
    """Run a server with these limits."""
    app, connections = Recorder(), Connections(limits or HttpLimits())
    if fit_files:
        connections.fit_files()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=partial(Protocol, connections=connections),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        (listening,) = server.servers
        yield Server(app, connections, listening.sockets[0].getsockname()[1])
    finally:
        server.force_exit = True
        await server.shutdown()


def answers(raw: bytes) -> list[tuple[int, dict[str, str], Any]]:
    """Split a connection's bytes into the status, headers and JSON of each answer."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        size = int(headers["content-length"])
        found.append((int(first.split()[1]), headers, json.loads(raw[:size])))
        raw = raw[size:]
    return found
