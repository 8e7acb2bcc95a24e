"""Receives webhooks in the benchmark's process. It counts the ids and checks the signatures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections import Counter, defaultdict
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"


class Receiver:
    """A small HTTP server that answers 204. ``ids``: deliveries by webhook id; ``ids_of``: ids by job."""

    def __init__(self, secret: str) -> None:
        self._key = base64.b64decode(secret.removeprefix("whsec_"))
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.ids: Counter[str] = Counter()
        self.ids_of: defaultdict[str, set[str]] = defaultdict(set)
        self.types: Counter[str] = Counter()
        self.forged = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0, backlog=512)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def url(self) -> str:
        """The URL for webhooks."""
        assert self._server is not None
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}/hook"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[1:]
                pairs = (line.partition(":") for line in head if line)
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                self._take(headers, await reader.readexactly(int(headers["content-length"])))
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
                await writer.drain()
        writer.close()

    def _take(self, headers: dict[str, str], body: bytes) -> None:
        id_ = headers["webhook-id"]
        signed = b".".join((id_.encode(), headers["webhook-timestamp"].encode(), body))
        mine = base64.b64encode(hmac.digest(self._key, signed, hashlib.sha256)).decode()
        if headers["webhook-signature"] != f"v1,{mine}":
            self.forged += 1
            return
        event = json.loads(body)
        self.ids[id_] += 1
        self.ids_of[event["data"]["id"]].add(id_)
        self.types[event["type"]] += 1
