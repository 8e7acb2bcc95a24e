"""The timeouts and the number of connections, on real sockets."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import time

import pytest

from tests.conftest import PATIENCE_S
from tests.integration.kernel.http_server import answers, serving
from tidegate.kernel.http import connections as module
from tidegate.kernel.http import timeouts as patience
from tidegate.kernel.http.connections import CLOSED, Connections
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.http.timeouts import HttpLimits

pytestmark = pytest.mark.integration

HEAD = b"POST /first HTTP/1.1\r\nHost: a\r\nContent-Length: 65536\r\nX-Request-Id: r\r\n\r\n"
GET = b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n"
# A whole second is two hundred sweeps.
SHORT = HttpLimits(header_timeout_s=0.2, idle_timeout_s=0.4, body_grace_s=0.3, body_bytes_per_s=100)


@pytest.fixture(autouse=True)
def _quick_sweeps(monkeypatch):
    monkeypatch.setattr(module, "SWEEP_S", 0.005)


class Peer:
    """A client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, *pieces: bytes, host: str = "127.0.0.1") -> Peer:
        found = cls(*await asyncio.open_connection("127.0.0.1", port, local_addr=(host, 0)))
        for piece in pieces:
            found.writer.write(piece)
            await found.writer.drain()
        return found

    async def end(self) -> bytes:
        """Return everything until the server closes; nothing if it resets the connection."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self.reader.read()
        except ConnectionError:
            return b""
        finally:
            self.writer.transport.abort()

    async def is_open(self) -> bool:
        """Return True if the server answers on it."""
        try:
            self.writer.write(GET)
            async with asyncio.timeout(PATIENCE_S):
                head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
                await self.reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
                return head.startswith(b"http/1.1 200")
        except (ConnectionError, asyncio.IncompleteReadError):
            return False


async def test_a_silent_connection_is_closed():
    async with serving(SHORT) as server:
        assert await (await Peer.open(server.port)).end() == b""
        assert len(server.connections) == 0


@pytest.mark.parametrize("begun", [b"G", GET[:-1], GET[:-2] + b"x: " + b"v" * 30_000])
async def test_half_a_head_is_told_that_it_is_late(begun):
    counted = CLOSED.labels("header_timeout")._value
    before = counted.get()
    async with serving(SHORT) as server:
        ((status, _, told),) = answers(await (await Peer.open(server.port, begun)).end())
        assert (status, told["reason"]) == (408, "header_timeout")
        assert counted.get() == before + 1
        assert (server.app.seen, server.connections.pending_heads) == ([], 0)


async def test_a_head_that_drips_is_late_too():
    async with serving(SHORT) as server:
        peer = await Peer.open(server.port, b"GET / HTTP/1.1\r\n")

        async def drip() -> None:
            while True:
                peer.writer.write(b"a: 1\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        ((status, _, _),) = answers(await peer.end())
        dripping.cancel()
        assert status == 408


@pytest.mark.parametrize("given", [b"", b"x" * 65_535])
async def test_a_body_that_stands_still_is_refused(given):
    async with serving(SHORT) as server:
        ((status, _, told),) = answers(await (await Peer.open(server.port, HEAD, given)).end())
        assert (status, told["reason"], told["request_id"]) == (408, "body_too_slow", "r")
        assert server.app.seen == [{"path": "/first", "gone": True}]


async def test_a_slow_body_above_the_pace_passes():
    limits = SHORT._replace(body_bytes_per_s=10)
    async with serving(limits) as server:
        peer = await Peer.open(server.port, HEAD.replace(b"65536", b"1000\r\nConnection: close"))
        for _ in range(100):
            peer.writer.write(b"0123456789")
            await asyncio.sleep(0.01)
        assert answers(await peer.end())[0][0] == 200
        assert len(server.app.seen[0]["body"]) == 1000


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not():
    async with serving(SHORT) as server:
        peer = await Peer.open(server.port, GET)
        assert [status for status, _, _ in answers(await peer.end())] == [200]
        server.app.gate.clear()
        waiting = await Peer.open(server.port, GET)
        await asyncio.sleep(1)  # longer than any limit
        server.app.gate.set()
        assert [status for status, _, _ in answers(await waiting.end())] == [200]


def answer_of(size: int) -> bytes:
    """Return a request whose answer is larger than the buffers of both sides."""
    head = GET.replace(b"GET", b"POST")[:-2] + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % size
    return head + b"x" * size


@pytest.fixture
def _unread_soon(monkeypatch):
    monkeypatch.setattr(patience, "UNREAD_S", 0.3)


@pytest.mark.usefixtures("_unread_soon")
async def test_an_answer_that_nobody_reads_is_given_up():
    async with serving(SHORT) as server:
        peer = await Peer.open(server.port)
        peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
        peer.writer.write(answer_of(20_000_000))
        while not server.app.seen or len(server.connections):
            await asyncio.sleep(0.01)
        peer.writer.transport.abort()


@pytest.mark.usefixtures("_unread_soon")
async def test_an_answer_that_is_read_slowly_is_not():
    async with serving(SHORT) as server:
        peer = await Peer.open(server.port)
        peer.writer.write(answer_of(20_000_000))
        head = await peer.reader.readuntil(b"\r\n\r\n")
        left = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
        while left > 0:
            piece = await peer.reader.read(500_000)
            assert piece, "it was cut off"
            left -= len(piece)
            await asyncio.sleep(0.02)
        peer.writer.transport.abort()


async def test_requests_set_no_timers():
    async with serving() as server:
        peer = await Peer.open(server.port)
        for _ in range(3):
            assert await peer.is_open()
        (connection,) = server.connections._all
        assert isinstance(connection, Protocol)
        assert connection.timeout_keep_alive_task is None
        peer.writer.transport.abort()


@pytest.mark.parametrize("limit", [{"connections": 50}, {"connections_per_peer": 50}])
@pytest.mark.parametrize("kind", [b"", GET[:-1], HEAD + b"x" * 60_000, GET])
async def test_a_flood_of_connections_does_not_shut_others_out(limit, kind):
    """The oldest unused connections are closed. A request that is being answered goes on."""
    async with serving(HttpLimits(**limit)) as server:
        server.app.gate.clear()
        busy = await Peer.open(server.port, GET)
        while not server.app.seen:
            await asyncio.sleep(0.01)
        server.app.gate.set() if kind == GET else None
        flood = [await Peer.open(server.port, kind) for _ in range(200)]
        server.app.gate.set()
        assert len(server.connections) <= 50
        assert await (await Peer.open(server.port)).is_open()
        assert (await busy.reader.readline()).startswith(b"HTTP/1.1 200")
        for each in [busy, *flood]:
            each.writer.transport.abort()


async def test_one_peer_cannot_take_the_places_of_another():
    async with serving(HttpLimits(connections_per_peer=20)) as server:
        other = [await Peer.open(server.port, host="127.0.0.2") for _ in range(10)]
        flood = [await Peer.open(server.port, host="127.0.0.3") for _ in range(100)]
        assert len(server.connections) <= 30
        assert all([await each.is_open() for each in other])
        for each in other + flood:
            each.writer.transport.abort()


async def test_when_all_are_busy_a_new_one_is_told_so():
    async with serving(HttpLimits(connections=16)) as server:
        server.app.gate.clear()
        busy = [await Peer.open(server.port, GET) for _ in range(16)]
        while len(server.app.seen) < 16:
            await asyncio.sleep(0.01)
        for _ in range(3):
            ((status, _, told),) = answers(await (await Peer.open(server.port)).end())
            assert (status, told["reason"]) == (503, "overloaded")
        server.app.gate.set()
        for each in busy:
            assert (await each.reader.readline()).startswith(b"HTTP/1.1 200")
            each.writer.transport.abort()


async def test_heads_that_are_not_complete_have_a_limit_together():
    async with serving(HttpLimits(pending_head_bytes=500_000)) as server:
        peers = [await Peer.open(server.port, GET[:-2] + b"x: " + b"v" * 50_000) for _ in range(50)]
        while server.connections.pending_heads == 0 or len(server.connections) > 45:
            await asyncio.sleep(0.01)
        assert server.connections.pending_heads <= 500_000
        assert await (await Peer.open(server.port)).is_open()
        for each in peers:
            each.writer.transport.abort()


FEW_FILES = """
import asyncio, resource, sys, time
import uvloop
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from tests.integration.kernel.http_server import serving
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.timeouts import HttpLimits

async def main():
    async with serving(fit_files=sys.argv[1] == "fit") as server:
        print(server.port, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        used = time.process_time()
        await asyncio.to_thread(sys.stdin.readline)
        print(time.process_time() - used, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

uvloop.run(main())
"""


@pytest.mark.parametrize("fit", ["fit", "unfit"])
async def test_at_the_limit_of_open_files_the_server_answers_and_does_not_spin(fit, figure, until):
    """``unfit``: other files than connections use up the limit."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FEW_FILES, fit, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    flood = []
    for _ in range(400):
        try:
            flood.append(await Peer.open(port))
        except ConnectionError:
            pass
    process.stdin.write(b"\n")
    began = time.monotonic()
    if fit == "fit":
        assert await (await Peer.open(port)).is_open()
    await asyncio.sleep(2)
    elapsed = time.monotonic() - began
    process.stdin.write(b"\n")
    used = float(await process.stdout.readline())
    figure(f"400 connections into 200 files ({fit}): {used:.2f} s of CPU in {elapsed:.1f} s")
    assert used < elapsed / 2, "it does not spin"
    for each in flood:
        each.writer.transport.abort()

    async def answers_again() -> bool:
        return await (await Peer.open(port)).is_open()

    await until(answers_again)
    process.stdin.write(b"\n")
    await process.communicate()


def test_the_limit_of_open_files_is_raised(monkeypatch):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: given.append(limits))
    Connections(HttpLimits(connections=2000)).fit_files()
    assert given == [(2000 + module.RESERVED_FILES, hard)]
    Connections(HttpLimits(connections=2000)).fit_files(others=300)
    assert given[1:] == [(2300 + module.RESERVED_FILES, hard)]


def test_connections_of_other_ports_have_files_too(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10_000, 10_000))
    connections = Connections(HttpLimits(connections=9000))
    connections.fit_files(others=4000)
    assert connections._most == 10_000 - module.RESERVED_FILES - 4000


async def test_a_fault_in_one_connection_does_not_end_the_sweep(monkeypatch):
    async with serving(SHORT) as server:
        broken = await Peer.open(server.port)
        assert await broken.is_open()
        (connection,) = server.connections._all
        monkeypatch.setattr(connection, "check", lambda _: 1 / 0)
        assert await broken.end() == b""
        assert await (await Peer.open(server.port)).end() == b"", "it is silent, and still closed in time"
