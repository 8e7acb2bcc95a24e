"""A small HTTP/1.1 client on asyncio streams, for loads that wrk cannot generate, and to read headers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

HOST = "127.0.0.1"
LINE_LIMIT = 2**20
IDLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """Keeps connections open between requests, one for each concurrent caller."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST; see :meth:`request`."""
        return await self.request("POST", path, body, headers)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """GET; see :meth:`request`."""
        return await self.request("GET", path, b"", headers or {})

    async def request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send one request and read its response. Raise OSError or EOFError if the connection breaks.

        A cancelled request closes its connection, like a caller that disconnects.
        """
        reader, writer = await self._connection()
        done = False
        try:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(body)}\r\n{lines}\r\n"
            writer.write(head.encode() + body)
            answer = await _read(reader)
            done = True
        finally:
            if done:
                self._idle.append((time.monotonic(), reader, writer))
            else:
                writer.close()
        return answer

    def local_ports(self) -> list[int]:
        """Return this end's ports of the idle connections."""
        return [writer.get_extra_info("sockname")[1] for _, _, writer in self._idle]

    def close(self) -> None:
        """Close the idle connections."""
        for _, _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the most recently used connection, or a new one: servers soon close idle ones."""
        fresh = [each for each in self._idle if time.monotonic() - each[0] < IDLE_S]
        for _, _, writer in self._idle[: len(self._idle) - len(fresh)]:
            writer.close()
        self._idle = fresh
        return self._idle.pop()[1:] if self._idle else await self._open()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(HOST, self._port, limit=LINE_LIMIT)


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.lower(): value.strip()
        for name, colon, value in (line.partition(":") for line in head[1:])
        if colon
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(head[0].split(" ", 2)[1]), headers, body)
