"""Composition root of the autoscaler: reads like a table of contents."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from services.autoscaler.adapters.events import Events
from services.autoscaler.adapters.launcher_process import ProcessLauncher, ProcessPlan
from services.autoscaler.adapters.leader import LeaderLock
from services.autoscaler.adapters.ledger import Ledger
from services.autoscaler.adapters.overrides import Overrides
from services.autoscaler.adapters.registry import IntentionSource, RegistryClient
from services.autoscaler.api import operators
from services.autoscaler.domain.launcher import Launcher
from services.autoscaler.loop import Loop, Parts
from services.autoscaler.operations import Operations
from services.autoscaler.settings import AutoscalerSettings
from tidegate import tasks
from tidegate.service import create_app
from tidegate.store import Store

ROOT = Path(__file__).resolve().parents[2]


def build(settings: AutoscalerSettings, launcher: Launcher | None = None) -> FastAPI:
    """The autoscaler's app; ``launcher`` None: the one that the settings name."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await _start(app, settings, launcher or process_launcher(settings), stack)
            yield
        # Workers are left running: whoever comes next adopts them.

    return create_app(name="autoscaler", settings=settings, lifespan=lifespan, routers=[operators.router])


def process_launcher(settings: AutoscalerSettings) -> ProcessLauncher:
    """Workers as processes that run this very installation."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "TIDEGATE_RUNTIME_DIR": str(settings.runtime_path),
        "TIDEGATE_AMQP_URL": settings.amqp_url,
        "TIDEGATE_REDIS_URL": settings.redis_url,
        "TIDEGATE_REGISTRY_URL": settings.registry_url,
        "TIDEGATE_LOG_LEVEL": settings.log_level,
    }
    # -P: the folder that the stack was started in is not on the import path.
    command = [sys.executable, "-P", "-m", "services.worker", "--replica-dir"]
    return ProcessLauncher(ProcessPlan(command, settings.state_path, environment))


async def _start(
    app: FastAPI, settings: AutoscalerSettings, launcher: Launcher, stack: AsyncExitStack
) -> None:
    """Start everything, in order; ``stack`` ends it in the opposite order."""
    state = settings.state_path
    leader = LeaderLock(state / "run" / "autoscaler.lock")
    stack.callback(leader.release)
    ledger = Ledger(state / "data" / "autoscaler.db", settings.autoscaler_decisions_kept)
    stack.callback(ledger.close)
    store = Store.connect(settings.redis_url)
    stack.push_async_callback(store.close)
    registry = RegistryClient(settings.registry_url, settings.service_token)
    stack.push_async_callback(registry.close)
    source = IntentionSource(registry, state / "data" / "intention.json", lambda: loop.wake())
    source.load_cache()
    parts = Parts(
        launcher, store, source, Overrides(registry, ledger, time.time), ledger, settings.registry_url
    )
    loop = Loop(parts, settings.policy(), settings.autoscaler_period_s)
    events = Events(settings.amqp_url, on_registry=source.refresh_soon, on_demand=loop.hint)
    await stack.enter_async_context(events)
    app.state.operations = Operations(loop, parts, leader, settings.policy())
    _add_checks(app, leader, source, loop, events)
    _run(stack, source.run(settings.autoscaler_relist_s))
    _run(stack, _lead(leader, loop))


def _add_checks(
    app: FastAPI, leader: LeaderLock, source: IntentionSource, loop: Loop, events: Events
) -> None:
    app.state.health.add(
        "leader",
        lambda: None if leader.held else f"Standby: process {leader.holder()} leads and has the lock.",
    )
    app.state.health.add("intention", lambda: source.problem if source.current is None else None)
    app.state.health.add("loop", lambda: loop.problem if leader.held else None)
    app.state.health.add("store", lambda: loop.store_problem)
    app.state.health.add("events", lambda: events.problem)


def _run(stack: AsyncExitStack, work: Coroutine[None, None, None]) -> None:
    """Run ``work`` until the stack ends, which waits for it to have stopped."""
    task = asyncio.create_task(work)

    async def stop() -> None:
        await tasks.end(task)

    stack.push_async_callback(stop)


async def _lead(leader: LeaderLock, loop: Loop) -> None:
    """Wait for the lock, then take over what the former leader left and run the loop."""
    await leader.take()
    loop.take_over()
    await loop.run()
