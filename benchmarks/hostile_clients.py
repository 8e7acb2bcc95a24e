"""``python -m benchmarks.hostile_clients PORT KIND COUNT``: open hostile connections to a local port.

This is a separate process, because it needs as many open files as the server. It reopens each connection that
the server closes, and prints the number of open connections every second.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
from itertools import cycle, islice
from typing import cast

import uvloop

HOST = "127.0.0.1"
PATH = b"/v2/models/echo/infer"
BODY = 65_536
_HEAD = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\n" % PATH
_WHOLE = b"%bContent-Length: %d\r\n\r\n" % (_HEAD, BODY)
# The bytes that each kind sends first, and those that it sends every DRIP_S seconds.
KINDS = {
    "silent": (b"", b""),
    "half a head": (_HEAD, b""),
    "half a body": (_WHOLE + bytes(BODY // 2), b""),
    "all but a byte": (_WHOLE + bytes(BODY - 1), b""),
    "dripping head": (_HEAD, b"a: 1\r\n"),
    "dripping body": (_WHOLE + bytes(1000), b"x"),
}
MIXED = "mixed"
DRIP_S = 2.0
# Connections opened in one step, and reopened in a second: the attacker also has only one core.
BATCH = 100
AGAIN_PER_S = 500


class Hostile(asyncio.Protocol):
    """One connection."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.open = False
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first bytes of this kind."""
        # Uvloop's transports are not subclasses of asyncio's.
        self._transport, self.open = cast(asyncio.Transport, transport), True
        self._transport.write(KINDS[self.kind][0])

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the server has closed the connection."""
        self.open = False

    def drip(self) -> None:
        """Send the next bytes of this kind."""
        if self.open and self._transport is not None:
            self._transport.write(KINDS[self.kind][1])


async def attack(port: int, kind: str, count: int) -> None:
    """Keep this number of connections open until the process is ended."""
    kinds = cycle(KINDS) if kind == MIXED else cycle([kind])
    everyone = [Hostile(each) for each in islice(kinds, count)]
    await _open(port, everyone)
    print(sum(each.open for each in everyone), flush=True)
    loop, second = asyncio.get_running_loop(), 0
    while True:
        begun = loop.time()
        second += 1
        lost = [each for each in everyone if not each.open]
        await _open(port, lost[:AGAIN_PER_S])
        if second % int(DRIP_S) == 0:
            for each in everyone:
                if KINDS[each.kind][1]:
                    each.drip()
        print(sum(each.open for each in everyone), flush=True)
        await asyncio.sleep(max(0.0, 1.0 - (loop.time() - begun)))


async def _open(port: int, connections: list[Hostile]) -> None:
    loop = asyncio.get_running_loop()

    async def one(each: Hostile) -> None:
        with contextlib.suppress(OSError):
            await loop.create_connection(lambda: each, HOST, port)

    for at in range(0, len(connections), BATCH):
        await asyncio.gather(*(one(each) for each in connections[at : at + BATCH]))


def main() -> None:
    """Attack."""
    os.nice(19)  # a real attacker does not use the server's cores
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(attack(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))


if __name__ == "__main__":
    main()
