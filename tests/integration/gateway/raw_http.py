"""Raw HTTP for tests: several requests in one write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from tests.conftest import PATIENCE_S


async def pipelined(
    port: int, path: str, bodies: Sequence[bytes], headers: Mapping[str, str], tail: bytes = b""
) -> bytes:
    """Send a POST for each body in one write, then ``tail``; return all that comes back."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = []
    for at, body in enumerate(bodies, 1):
        last = "Connection: close\r\n" if at == len(bodies) and not tail else ""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{lines}{last}Content-Length: {len(body)}\r\n\r\n"
        requests.append(head.encode() + body)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"".join(requests) + tail)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.transport.abort()
