"""Create the parts of the autoscaler and connect them (composition root)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.event_consumer import EventConsumer
from services.autoscaler.adapters.history.cost_store import CostStore
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
from services.autoscaler.api import costs, logs, operators, prometheus, replay, verifications, worker_settings
from services.autoscaler.application.control_loop import ControlLoop, LoopParts
from services.autoscaler.application.cost_ledger import CostLedger
from services.autoscaler.application.log_reader import LogReader
from services.autoscaler.application.operations import Operations
from services.autoscaler.application.recorder import Recorder
from services.autoscaler.application.replay_runner import ReplayRunner
from services.autoscaler.application.verifier import Verifier
from services.autoscaler.application.warm_pool import WarmPool
from services.autoscaler.domain.launcher import Launcher
from services.autoscaler.domain.snapshot import HostProbe
from services.autoscaler.launcher_wiring import launcher_of, worker_environment
from services.autoscaler.settings import AutoscalerSettings
from tidegate.kernel.log_files import LogFolder
from tidegate.kernel.price_file import PriceFile
from tidegate.kernel.service.api import create_app
from tidegate.kernel.store import JobStore, Store
from tidegate.kernel.tasks import TaskSet

PRUNE_S = 600.0


def build(
    settings: AutoscalerSettings, launcher: Launcher | None = None, probe: HostProbe | None = None
) -> FastAPI:
    """Return the autoscaler's app.

    If ``launcher`` is None, the settings choose the launcher. ``probe`` reads the resources of the host.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            chosen = (launcher, probe or MachineProbe()) if launcher is not None else launcher_of(settings)
            await _start(app, settings, *chosen, stack)
            yield
        # Workers keep running after the shutdown. The next autoscaler adopts them.

    app = create_app(
        name="autoscaler",
        settings=settings,
        lifespan=lifespan,
        routers=[
            operators.router,
            costs.router,
            logs.router,
            replay.router,
            prometheus.router,
            worker_settings.router,
            verifications.router,
        ],
        larger_bodies={"/v1/replay": replay.MAX_BODY},
    )
    app.state.host = settings.host
    app.state.worker_environment = worker_environment(settings)
    return app


async def _start(
    app: FastAPI, settings: AutoscalerSettings, launcher: Launcher, probe: HostProbe, stack: AsyncExitStack
) -> None:
    """Start all parts in order; ``stack`` ends them in reverse order."""
    state = settings.state_path
    leader = LeaderLock(state / "run" / "autoscaler.lock")
    stack.callback(leader.release)
    decisions = DecisionStore(state / "data" / "autoscaler.db", settings.autoscaler_decisions_kept)
    stack.callback(decisions.close)
    store = Store.connect(settings.redis_url)
    stack.push_async_callback(store.close)
    jobs = JobStore.connect(settings.jobs_url)
    stack.push_async_callback(jobs.close)
    registry = RegistryClient(settings.registry_url, settings.service_token)
    stack.push_async_callback(registry.close)
    source = DesiredStateSource(registry, state / "data" / "intention.json", lambda: _wake(loop, verifier))
    source.load_cache()
    recordings = Recordings(state / "data" / "history.db", settings.autoscaler_history_mb * 2**20)
    stack.callback(recordings.close)
    recorder = Recorder(recordings, settings.policy(), observations=settings.autoscaler_history_mb > 0)
    stack.push_async_callback(lambda: recorder.flush(time.time()))
    overrides = Overrides(registry, decisions, time.time)
    offers = await stack.enter_async_context(WarmOffers(settings.amqp_url, settings.autoscaler_warm))
    grants = ReplicaGrants(registry)
    pool = WarmPool(launcher, store, decisions, offers, grants, settings.autoscaler_warm, state / "log")
    amounts = CostStore(state / "data" / "costs.db", settings.autoscaler_costs_days)
    stack.callback(amounts.close)
    ledger = CostLedger(store, amounts, PriceFile(settings.prices), lambda: pool.waiting)
    app.state.costs = ledger
    parts = LoopParts(pool, store, jobs, source, overrides, decisions, recorder, grants, probe, ledger)
    host = settings.autoscaler_host_name or socket.gethostname()
    loop = ControlLoop(parts, settings.policy(), settings.autoscaler_period_s, host)
    app.state.verifier = verifier = Verifier(
        launcher,
        pool,
        store,
        registry,
        source,
        decisions,
        grants,
        probe,
        settings.policy(),
        lambda: loop.host in loop.cordoned,
    )
    events = EventConsumer(settings.amqp_url, on_registry=source.refresh_soon, on_demand=loop.hint)
    await stack.enter_async_context(events)
    operations = Operations(loop, parts, pool, leader, settings.policy())
    metrics.measure_disk(state)
    _add_routes(app, settings, operations, recordings)
    _add_checks(app, leader, source, loop, events, pool)
    tasks, leads = TaskSet(), asyncio.Event()
    stack.push_async_callback(tasks.end)
    tasks.start(source.run(settings.autoscaler_relist_s), "read the registry")
    tasks.start(_lead(leader, loop, pool, lambda: ledger.take_over(source.current), leads), "control loop")
    tasks.start(_book(ledger, leads), "book costs")
    tasks.start(_hold(pool, loop, leads), "warm pool")
    tasks.start(_grant(grants, leads), "report replicas")
    tasks.start(_verify(verifier, leads), "verify versions")
    tasks.start(
        _prune_logs(ReplicaLogs(state / "log", settings.log_limits()), state / "replicas"), "prune logs"
    )


def _add_routes(
    app: FastAPI, settings: AutoscalerSettings, operations: Operations, recordings: Recordings
) -> None:
    """Put the objects that the routes use into ``app.state``."""
    state, parts = settings.state_path, operations.parts
    app.state.operations = operations
    app.state.logs = LogReader(
        LogFolder(state / "log"),
        parts.launcher,
        lambda: parts.source.current,
        lambda: [each["replica"] for each in operations.replicas()],
    )
    app.state.replays = ReplayRunner(
        operations,
        recordings,
        settings.policy(),
        settings.autoscaler_period_s,
        state / "cache" / "matplotlib",
    )


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
        lambda: None if leader.held else f"Standby: process {leader.holder()} is the leader.",
    )
    app.state.health.add("intention", lambda: source.problem if source.current is None else None)
    app.state.health.add("loop", lambda: loop.problem if leader.held else None)
    app.state.health.add("warm pool", lambda: pool.problem)
    app.state.health.add("store", lambda: loop.store_problem)
    app.state.health.add("jobs", lambda: loop.jobs_problem)
    app.state.health.add("events", lambda: events.problem)


async def _lead(
    leader: LeaderLock,
    loop: ControlLoop,
    pool: WarmPool,
    take_over_costs: Callable[[], None],
    leads: asyncio.Event,
) -> None:
    """Wait for the leader lock, read the state of the former leader, and run the control loop."""
    await leader.take()
    loop.take_over()
    pool.take_over()
    take_over_costs()
    leads.set()
    await loop.run()


async def _hold(pool: WarmPool, loop: ControlLoop, leads: asyncio.Event) -> None:
    """Wait until this process leads. Then keep the warm pools filled."""
    await leads.wait()
    await pool.hold(lambda: loop.host not in loop.cordoned)


async def _prune_logs(kept: ReplicaLogs, replicas: Path) -> None:
    """Delete old logs regularly, even if no replica ends."""
    while True:
        await asyncio.sleep(PRUNE_S)
        await asyncio.to_thread(kept.prune, lambda each: (replicas / each).is_dir())


async def _book(ledger: CostLedger, leads: asyncio.Event) -> None:
    """Wait until this process leads. Then write the costs of replicas to the cost ledger."""
    await leads.wait()
    await ledger.run()


def _wake(loop: ControlLoop, verifier: Verifier) -> None:
    """Let the control loop and the verifier act on a changed desired state immediately."""
    loop.wake()
    verifier.wake()


async def _verify(verifier: Verifier, leads: asyncio.Event) -> None:
    """Wait until this process leads. Then verify versions."""
    await leads.wait()
    verifier.take_over()
    await verifier.run()


async def _grant(grants: ReplicaGrants, leads: asyncio.Event) -> None:
    """Wait until this process leads. Then report the running replicas to the registry."""
    await leads.wait()
    await grants.run()
