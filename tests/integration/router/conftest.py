"""A registry in miniature: a real HTTP server that says what is wanted and hears what is settled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from tidegate.protocol.models import (
    Deployment,
    Endpoint,
    Intention,
    Signature,
    Target,
    TensorSpec,
    Version,
)
from tidegate.stack.ports import free_ports
from tidegate.store import Store

BORN = datetime(2024, 1, 1, tzinfo=UTC)
TOKEN = "token"


class SmallRegistry:
    """``intention`` is what it says; ``settled`` are the endpoints whose roll-over was reported complete."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.port = free_ports(1)[0]
        self.settled: list[tuple[str, dict[str, Any]]] = []
        self.reads = 0
        self.broken = False
        self.intention = Intention(
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
        """Another intention."""
        self.intention = self.intention.model_copy(
            update={"revision": self.intention.revision + 1, "endpoints": list(endpoints)}
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
        content = b"{broken" if self.broken else self.intention.model_dump_json().encode()
        return Response(content, media_type="application/json")

    async def _on_settle(self, name: str, request: Request) -> dict[str, Any]:
        self.settled.append((name, await request.json()))
        self.say(*(e.model_copy(update={"previous": []}) for e in self.intention.endpoints))
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
