"""Send one HTTP/1.1 POST and read the answer line by line, as it arrives.

This needs less time per event than a full HTTP client, so the load generator hardly delays the answers that
it measures.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tidegate.kernel.http.certificates import trusted
from tidegate.tune.measurement import GatewayAddress

CONNECT_TIMEOUT_S = 10.0
_LONGEST_LINE = 2**20


@dataclass(frozen=True, slots=True)
class Target:
    """The server, the path and the credential of a POST. ``headers``: more headers to send."""

    address: GatewayAddress
    path: str
    token: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, body: bytes) -> bytes:
        """Return the bytes of a request. It asks the server to close the connection after the answer."""
        address = self.address
        host = f"[{address.host}]" if ":" in address.host else address.host
        lines = (
            f"POST {address.prefix}{self.path} HTTP/1.1",
            f"Host: {host}:{address.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers.items()),
            *([f"Authorization: Bearer {self.token}"] if self.token else []),
        )
        return "\r\n".join((*lines, "", "")).encode() + body


@dataclass(slots=True)
class HttpAnswer:
    """An HTTP answer whose body is not read yet. Names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader

    @property
    def streams(self) -> bool:
        """Return True if the body is a stream of events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def body(self) -> bytes:
        """Read and return the rest of the body."""
        return b"".join([piece async for piece in self._pieces()])

    async def lines(self) -> AsyncGenerator[bytes]:
        """Yield each line of the body without its line break. Raise EOFError if the body is cut off."""
        left = b""
        async for piece in self._pieces():
            *whole, left = (left + piece).split(b"\n")
            for line in whole:
                yield line.rstrip(b"\r")
        if left:
            yield left

    async def _pieces(self) -> AsyncIterator[bytes]:
        reader = self._reader
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int((await reader.readline()).partition(b";")[0] or b"", 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
        elif (length := self.headers.get("content-length")) is not None:
            yield await reader.readexactly(int(length))
        else:
            while piece := await reader.read(65536):
                yield piece


@asynccontextmanager
async def posted(target: Target, body: bytes) -> AsyncIterator[HttpAnswer]:
    """Send a POST and yield its answer when the headers have arrived. At the end, close the connection.

    Raise OSError, EOFError or asyncio.TimeoutError if the connection fails.
    """
    address = target.address
    tls = trusted(f"https://{address.host}") if address.tls else None
    connecting = asyncio.open_connection(address.host, address.port, ssl=tls, limit=_LONGEST_LINE)
    reader, writer = await asyncio.wait_for(connecting, CONNECT_TIMEOUT_S)
    try:
        writer.write(target.request(body))
        yield await _answer(reader)
    finally:
        writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> HttpAnswer:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    return HttpAnswer(int(first.split(" ")[1]), headers, reader)
