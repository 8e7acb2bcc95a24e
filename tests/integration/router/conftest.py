"""A small registry and a small receiver of webhooks, as real HTTP servers, and jobs in any state."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import Finish, NewJob, Take, new_id
from tidegate.kernel.protocol.models import (
    Deployment,
    DesiredState,
    Endpoint,
    Signature,
    Target,
    TensorSpec,
    Version,
)
from tidegate.kernel.store import JobStore, Store
from tidegate.stack.ports import free_ports

BORN = datetime(2024, 1, 1, tzinfo=UTC)
TOKEN = "token"


class SmallRegistry:
    """A registry that serves ``desired``. ``settled``: endpoints whose roll-over was reported complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = free_ports(1)[0]
        self.settled: list[tuple[str, dict[str, Any]]] = []
        self.reads = 0
        self.broken = False
        self.desired = DesiredState(
            revision=1,
            versions=[self.version(1), self.version(2)],
            deployments=[self.deployment(1), self.deployment(2)],
            endpoints=[self.endpoint([1])],
        )
        self._app = FastAPI()
        self._app.add_api_route("/v1/intention", self._on_read)
        self._app.add_api_route("/v1/endpoints/{name}/settle", self._on_settle, methods=["POST"])
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def version(self, number: int) -> Version:
        tensor = TensorSpec(name="x", datatype="FP32", shape=[2])
        return Version(
            model=self.name,
            number=number,
            format="onnx",
            artifact_sha256="0" * 64,
            artifact_size=1,
            filename="model.onnx",
            signature=Signature(inputs=[tensor], outputs=[tensor], max_batch_size=8),
            created_at=BORN,
        )

    def deployment(self, number: int, **given: Any) -> Deployment:
        return Deployment(
            name=f"{self.name}-v{number}",
            model=self.name,
            version=number,
            revision=1,
            created_at=BORN,
            **given,
        )

    def endpoint(self, now: list[int], before: list[int] | None = None) -> Endpoint:
        def targets(numbers: list[int]) -> list[Target]:
            return [Target(deployment=f"{self.name}-v{number}") for number in numbers]

        return Endpoint(name=self.name, targets=targets(now), previous=targets(before or []), revision=7)

    def say(self, *endpoints: Endpoint) -> None:
        """Change the desired state."""
        self.desired = self.desired.model_copy(
            update={"revision": self.desired.revision + 1, "endpoints": list(endpoints)}
        )

    async def start(self) -> None:
        config = uvicorn.Config(self._app, port=self.port, log_config=None, lifespan="off")
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = self._server.force_exit = True
            await self._task
            self._server = None

    async def _on_read(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return Response(status_code=401)
        self.reads += 1
        content = b"{broken" if self.broken else self.desired.model_dump_json().encode()
        return Response(content, media_type="application/json")

    async def _on_settle(self, name: str, request: Request) -> dict[str, Any]:
        self.settled.append((name, await request.json()))
        self.say(*(e.model_copy(update={"previous": []}) for e in self.desired.endpoints))
        return {}


@pytest.fixture
async def registry(fresh) -> AsyncIterator[SmallRegistry]:
    """A registry with two Deployments of one model and an endpoint on the first."""
    found = SmallRegistry(fresh("digits"))
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
async def store(valkey_url) -> AsyncIterator[Store]:
    """The store, empty."""
    found = Store.connect(valkey_url)
    await found._redis.flushall()
    yield found
    await found.close()


@pytest.fixture
async def jobs(valkey_url, store) -> AsyncIterator[JobStore]:
    """The store of jobs, empty."""
    found = JobStore.connect(valkey_url)
    yield found
    await found.close()


class Jobs:
    """Create jobs in the store, like gateway and worker."""

    def __init__(self, store: JobStore, deployment: str) -> None:
        self.store = store
        self.deployment = deployment

    async def accepted(self, webhook: str | None = None, *, ttl_s: float = 3600.0, **given: Any) -> bytes:
        """Create a job that is recorded but not published."""
        now = int(time.time() * 1e3)
        id_ = new_id(now, os.urandom(10))
        expires = now + int(ttl_s * 1e3)
        frame = envelope.request_frame(id_, expires, 1, b"", [b"data"])
        new = NewJob(id_, frame, "m", "e", self.deployment, 1, "team", now, expires, webhook=webhook, **given)
        await self.store.accept(new)
        return id_

    async def running(self, webhook: str | None = None, **given: Any) -> bytes:
        """Create a job that a worker runs as its first attempt."""
        id_ = await self.accepted(webhook, **given)
        await self.store.queued([id_])
        (taken,) = await self.store.take([Take(id_, "w", False, 0, os.urandom(8))])
        assert taken.outcome == "run"
        return id_

    async def ended(self, webhook: str | None = None, state: Any = "succeeded", **given: Any) -> bytes:
        """Create a job that is over."""
        id_ = await self.running(webhook, **given)
        assert await self.store.finish([Finish(id_, 1, state, b"reply")]) == [True]
        return id_


@pytest.fixture
def making(jobs, fresh) -> Jobs:
    """Jobs of a Deployment that only this test uses."""
    return Jobs(jobs, fresh("d"))


class Receiver:
    """A small HTTP server that keeps the webhooks that it receives, and responds as the test says.

    ``status`` None: it never answers.
    """

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.status: int | None = 204
        self.extra = ""
        self.open = 0
        self.most_open = 0
        self.delay_s = 0.0
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/hook"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]

    async def up(self) -> None:
        """Accept connections, on the same port each time."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                self.got.append((headers, body))
                self.open += 1
                self.most_open = max(self.most_open, self.open)
                try:
                    if self.status is None:
                        await reader.read()
                        break
                    await asyncio.sleep(self.delay_s)
                finally:
                    self.open -= 1
                writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n{self.extra}\r\n".encode())
                await writer.drain()
        writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A receiver of webhooks that responds with 204."""
    found = Receiver()
    await found.up()
    yield found
    await found.down()
