"""Serve several services in one process and one event loop, each on its own port."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass

import uvloop
from starlette.types import ASGIApp

from tidegate.kernel import telemetry
from tidegate.kernel.service.app import Server, prepare, server_of
from tidegate.kernel.settings.base import Settings

log = telemetry.logger(__name__)

POLL_S = 0.02
FAILED = 3  # uvicorn's exit code after a lifespan failed to start


@dataclass(frozen=True, slots=True)
class Part:
    """A service: its app, its settings and its port."""

    app: ASGIApp
    settings: Settings
    port: int


def run(parts: Sequence[Part]) -> int:
    """Serve until SIGTERM or SIGINT, or until one of the services ends. Return the exit code.

    Each service starts when the previous one is up. The services stop in the opposite order.
    """
    prepare(parts[0].settings)
    return uvloop.run(_run([server_of(part.app, part.settings, part.port, signals=False) for part in parts]))


async def _run(servers: Sequence[Server]) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running: list[tuple[Server, asyncio.Task[None]]] = []
    for server in servers:
        running.append((server, asyncio.create_task(_serve(server))))
        while not (server.started or running[-1][1].done() or stop.is_set()):
            await asyncio.sleep(POLL_S)
        if running[-1][1].done() or stop.is_set():
            break
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait([waiting, *(task for _, task in running)], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    for server, task in reversed(running):
        server.should_exit = True
        await asyncio.wait([task])
    return 0 if stop.is_set() else FAILED


async def _serve(server: Server) -> None:
    """Serve until the server ends.

    If the start fails, log the error and do not end the process. So the other services can stop in order.
    """
    try:
        await server.serve()
    except SystemExit as error:
        log.error("a service did not start", extra={"code": error.code})
