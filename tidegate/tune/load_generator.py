"""Generate load: a closed loop of connections, each with one request at a time.

``python -m tidegate.tune.load_generator`` reads from stdin: a :class:`LoadPlan` as one line of JSON, then the
raw HTTP/1.1 request. It writes a :class:`LoadResult` to stdout as JSON. The generator is a separate process,
because the parent's progress display would delay it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from tidegate.kernel.http.certificates import trusted
from tidegate.tune.curve import quantile

CONNECT_TIMEOUT_S = 5.0
# After the load, wait at most this many seconds for the responses to requests in flight. Otherwise, these
# requests would disturb the next run.
LINGER_S = 1.0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The address, connections and duration of a load. ``warm_s``: seconds of warm-up before the load."""

    host: str
    port: int
    tls: bool
    connections: int
    warm_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of a load that took ``seconds``.

    ``problem``: the first error. ``status``: the HTTP status of this error; 0 if it has none.
    """

    answers: int
    failed: int
    seconds: float
    p50_ms: float | None
    p99_ms: float | None
    problem: str = ""
    status: int = 0


@dataclass(slots=True)
class LoadCounters:
    """The counters that all connections share.

    ``open``: True while connections send requests. ``counts``: True while correct responses are counted.
    """

    open: bool = True
    counts: bool = False
    answers: int = 0
    failed: int = 0
    problem: str = ""
    status: int = 0
    latencies: list[float] = field(default_factory=list)

    def note(self, status: int, latency_s: float, body: bytes) -> None:
        """Count an error while ``open`` is True, or a correct response while ``counts`` is True."""
        if status != 200 and self.open:
            self.fail(_error_of(body), status)
        elif status == 200 and self.counts:
            self.answers += 1
            self.latencies.append(latency_s)

    def fail(self, problem: str, status: int = 0) -> None:
        """Count a failure, also during the warm-up."""
        if not self.failed:
            self.problem, self.status = problem, status
        self.failed += 1


class LoadConnection(asyncio.Protocol):
    """A connection that sends the request, waits for the whole response, and sends it again."""

    def __init__(self, request: bytes, count: LoadCounters) -> None:
        self._request = request
        self._count = count
        self._answer = bytearray()
        self._head = 0
        self._whole = 0
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None
        self.gone = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast(
            asyncio.Transport, transport
        )  # not isinstance, because uvloop's transports do not inherit from asyncio.Transport
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        self._answer, self._whole = bytearray(), 0
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Collect a part of a response. When the response is complete, count it and send the next request."""
        self._answer += data
        if not self._whole:
            self._head = self._answer.find(b"\r\n\r\n") + 4
            if self._head < 4:
                return
            self._whole = self._head + length_of(bytes(self._answer[: self._head]))
        if len(self._answer) < self._whole:
            return
        status, body = int(self._answer[9:12]), bytes(self._answer[self._head :])
        self._count.note(status, time.perf_counter() - self._sent, body)
        if self._count.open:
            self._send()
        else:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a failure if the connection ended while the load runs."""
        if self._count.open:
            self._count.fail(f"the connection was lost: {exc or 'closed by the gateway'}")
        if not self.gone.done():
            self.gone.set_result(None)

    def abort(self) -> None:
        """Close the connection immediately."""
        if self._transport is not None:
            self._transport.abort()


def length_of(head: bytes) -> int:
    """Return the ``Content-Length`` in the head of a response. Raise ValueError if there is none."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise ValueError("the gateway's response has no Content-Length")


def _error_of(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


async def run(plan: LoadPlan, request: bytes) -> LoadResult:
    """Send the planned load to the gateway. Raise OSError if the gateway does not accept connections."""
    loop, count = asyncio.get_running_loop(), LoadCounters()
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    context = trusted(f"https://{host}") if plan.tls else None
    callers: list[LoadConnection] = []
    try:

        async def connect() -> None:
            for _ in range(plan.connections):
                _, caller = await loop.create_connection(
                    lambda: LoadConnection(request, count), plan.host, plan.port, ssl=context
                )
                callers.append(caller)

        await asyncio.wait_for(connect(), CONNECT_TIMEOUT_S)
        await asyncio.sleep(plan.warm_s)
        began = time.perf_counter()
        if not count.failed:
            count.counts = True
            await asyncio.sleep(plan.seconds)
            count.counts = False
        seconds = time.perf_counter() - began
        count.open = False
        await asyncio.wait([caller.gone for caller in callers], timeout=LINGER_S)
    finally:
        count.open = False
        for caller in callers:
            caller.abort()
    latencies = sorted(latency * 1e3 for latency in count.latencies)
    p50, p99 = quantile(latencies, 0.50), quantile(latencies, 0.99)
    return LoadResult(count.answers, count.failed, seconds, p50, p99, count.problem, count.status)


def _run(figures: Coroutine[Any, Any, LoadResult]) -> LoadResult:
    try:
        import uvloop
    except ImportError:  # uvloop does not exist for Windows
        return asyncio.run(figures)
    return uvloop.run(figures)


def main() -> None:
    """Run the plan on stdin and write the result to stdout."""
    plan = LoadPlan(**json.loads(sys.stdin.buffer.readline()))
    request = sys.stdin.buffer.read()
    try:
        figures = _run(run(plan, request))
    except (OSError, asyncio.TimeoutError) as error:
        problem = f"the gateway accepts no connection: {error or 'no reply'}"
        figures = LoadResult(0, plan.connections, 0.0, None, None, problem)
    json.dump(asdict(figures), sys.stdout)


if __name__ == "__main__":
    main()
