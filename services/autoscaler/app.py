"""Composition root of the autoscaler: reads like a table of contents."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from services.autoscaler.adapters.event_consumer import EventConsumer
from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.history.recordings import Recordings
from services.autoscaler.adapters.leader_lock import LeaderLock
from services.autoscaler.adapters.process.machine_probe import MachineProbe
from services.autoscaler.adapters.registry.client import RegistryClient
from services.autoscaler.adapters.registry.desired_state import DesiredStateSource
from services.autoscaler.adapters.registry.overrides import Overrides
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.adapters.warm_offers import WarmOffers
from services.autoscaler.api import logs, operators, replay, worker_settings
from services.autoscaler.api import prometheus as targets
from services.autoscaler.application.control_loop import ControlLoop, LoopParts
from services.autoscaler.application.log_reader import LogReader
from services.autoscaler.application.operations import Operations
from services.autoscaler.application.recorder import Recorder
from services.autoscaler.application.replay_runner import ReplayRunner
from services.autoscaler.application.warm_pool import WarmPool
from services.autoscaler.domain.launcher import Launcher
from services.autoscaler.domain.snapshot import HostProbe
from services.autoscaler.launcher_wiring import launcher_of, worker_environment
from services.autoscaler.settings import AutoscalerSettings
from tidegate.kernel import tasks
from tidegate.kernel.log_files import LogFolder
from tidegate.kernel.service.api import create_app
from tidegate.kernel.store import JobStore, Store

PRUNE_S = 600.0


def build(
    settings: AutoscalerSettings, launcher: Launcher | None = None, room: HostProbe | None = None
) -> FastAPI:
    """The autoscaler's app; ``launcher`` None: the one that the settings name. ``room``: of its host."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            found = (launcher, room or MachineProbe()) if launcher is not None else launcher_of(settings)
            await _start(app, settings, *found, stack)
            yield
        # Workers are left running: whoever comes next adopts them.

    app = create_app(
        name="autoscaler",
        settings=settings,
        lifespan=lifespan,
        routers=[
            operators.router,
            logs.router,
            replay.router,
            targets.router,
            worker_settings.router,
        ],
        larger_bodies={"/v1/replay": replay.MAX_BODY},
    )
    app.state.host = settings.host
    app.state.worker_environment = worker_environment(settings)
    return app


async def _start(
    app: FastAPI, settings: AutoscalerSettings, launcher: Launcher, room: HostProbe, stack: AsyncExitStack
) -> None:
    """Start everything, in order; ``stack`` ends it in the opposite order."""
    state = settings.state_path
    leader = LeaderLock(state / "run" / "autoscaler.lock")
    stack.callback(leader.release)
    ledger = DecisionStore(state / "data" / "autoscaler.db", settings.autoscaler_decisions_kept)
    stack.callback(ledger.close)
    store = Store.connect(settings.redis_url)
    stack.push_async_callback(store.close)
    jobs = JobStore.connect(settings.jobs_url)
    stack.push_async_callback(jobs.close)
    registry = RegistryClient(settings.registry_url, settings.service_token)
    stack.push_async_callback(registry.close)
    source = DesiredStateSource(registry, state / "data" / "intention.json", lambda: loop.wake())
    source.load_cache()
    history = Recordings(state / "data" / "history.db", settings.autoscaler_history_mb * 2**20)
    stack.callback(history.close)
    recorder = Recorder(history, settings.policy(), observations=settings.autoscaler_history_mb > 0)
    stack.push_async_callback(lambda: recorder.flush(time.time()))
    overrides = Overrides(registry, ledger, time.time)
    offers = await stack.enter_async_context(WarmOffers(settings.amqp_url, settings.autoscaler_warm))
    grants = ReplicaGrants(registry)
    pool = WarmPool(launcher, store, ledger, offers, grants, settings.autoscaler_warm, state / "log")
    parts = LoopParts(pool, store, jobs, source, overrides, ledger, recorder, grants, room)
    host = settings.autoscaler_host_name or socket.gethostname()
    loop = ControlLoop(parts, settings.policy(), settings.autoscaler_period_s, host)
    events = EventConsumer(settings.amqp_url, on_registry=source.refresh_soon, on_demand=loop.hint)
    await stack.enter_async_context(events)
    operations = Operations(loop, parts, pool, leader, settings.policy())
    app.state.operations = operations
    app.state.logs = LogReader(
        LogFolder(state / "log"),
        pool,
        lambda: source.current,
        lambda: [each["replica"] for each in operations.replicas()],
    )
    app.state.replays = ReplayRunner(
        operations,
        history,
        settings.policy(),
        settings.autoscaler_period_s,
        state / "cache" / "matplotlib",
    )
    _add_checks(app, leader, source, loop, events, pool)
    _run(stack, source.run(settings.autoscaler_relist_s))
    leads = asyncio.Event()
    _run(stack, _lead(leader, loop, pool, leads))
    _run(stack, _hold(pool, loop, leads))
    _run(stack, _grant(grants, leads))
    _run(stack, _prune_logs(ReplicaLogs(state / "log", settings.log_limits()), state / "replicas"))


def _add_checks(
    app: FastAPI,
    leader: LeaderLock,
    source: DesiredStateSource,
    loop: ControlLoop,
    events: EventConsumer,
    pool: WarmPool,
) -> None:
    app.state.health.add(
        "leader",
        lambda: None if leader.held else f"Standby: process {leader.holder()} leads and has the lock.",
    )
    app.state.health.add("intention", lambda: source.problem if source.current is None else None)
    app.state.health.add("loop", lambda: loop.problem if leader.held else None)
    app.state.health.add("warm pool", lambda: pool.problem)
    app.state.health.add("store", lambda: loop.store_problem)
    app.state.health.add("jobs", lambda: loop.jobs_problem)
    app.state.health.add("events", lambda: events.problem)


def _run(stack: AsyncExitStack, work: Coroutine[None, None, None]) -> None:
    """Run ``work`` until the stack ends, which waits for it to have stopped."""
    task = asyncio.create_task(work)

    async def stop() -> None:
        await tasks.end(task)

    stack.push_async_callback(stop)


async def _lead(leader: LeaderLock, loop: ControlLoop, pool: WarmPool, leads: asyncio.Event) -> None:
    """Wait for the lock, then take over what the former leader left and run the loop."""
    await leader.take()
    loop.take_over()
    pool.take_over()
    leads.set()
    await loop.run()


async def _hold(pool: WarmPool, loop: ControlLoop, leads: asyncio.Event) -> None:
    """Keep the warm pool filled, once this process leads."""
    await leads.wait()
    await pool.hold(lambda: loop.host not in loop.cordoned)


async def _prune_logs(kept: ReplicaLogs, replicas: Path) -> None:
    """Delete logs that have become too old, also while nothing ends."""
    while True:
        await asyncio.sleep(PRUNE_S)
        await asyncio.to_thread(kept.prune, lambda each: (replicas / each).is_dir())


async def _grant(grants: ReplicaGrants, leads: asyncio.Event) -> None:
    """Tell the registry which replicas run, once this process leads."""
    await leads.wait()
    await grants.run()
