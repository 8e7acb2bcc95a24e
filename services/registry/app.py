"""Composition root of the registry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta

from fastapi import APIRouter, Depends, FastAPI

from services.registry.adapters import metrics, pickle_file
from services.registry.adapters.artifacts import ArtifactStore
from services.registry.adapters.change_notifier import ChangeNotifier
from services.registry.adapters.sql.database import Clock, RegistryDatabase, utc_now
from services.registry.adapters.usage_intake import UsageIntake
from services.registry.api import (
    artifacts,
    deployments,
    desired_state,
    endpoints,
    history,
    keys,
    models,
    replicas,
    traffic,
)
from services.registry.application.keyring import Keyring
from services.registry.application.registrar import Registrar, RegistryPolicy
from services.registry.domain.archive_limits import ArchiveLimits
from services.registry.settings import RegistrySettings
from tidegate.kernel.protocol.replica_token import Replicas
from tidegate.kernel.service.api import create_app

COLLECT_EVERY_S = 600.0


def build(settings: RegistrySettings, clock: Clock = utc_now) -> FastAPI:
    """The registry's app; the database must have been migrated before it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = RegistryDatabase(settings.database_url, clock)
        store = ArtifactStore(settings.artifact_url, max_bytes=settings.max_artifact_bytes)
        notifier = ChangeNotifier(settings.amqp_url)
        registrar = Registrar(database, store, notifier, _policy(settings))
        intake = UsageIntake(settings.amqp_url, database)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(database.close)
            await store.start()
            await notifier.start()
            stack.push_async_callback(notifier.stop)
            await registrar.observe()
            intake.start()
            stack.push_async_callback(intake.stop)
            app.state.registrar = registrar
            app.state.keyring = Keyring(registrar)
            app.state.usage = intake
            app.state.health.add("database", lambda: database.problem)
            app.state.health.add("artifacts", lambda: store.problem)
            await stack.enter_async_context(_background(registrar, settings.probe_every_s))
            yield

    closed = APIRouter(dependencies=[Depends(replicas.refuse_replicas)])
    for each in (artifacts, models, deployments, endpoints, desired_state, keys, history, replicas, traffic):
        closed.include_router(each.router)
    app = create_app(
        name="registry",
        settings=settings,
        lifespan=lifespan,
        routers=[artifacts.reading, closed],
        identify=replicas.identify(settings.service_token),
        larger_bodies={r"/v1/artifacts": None},  # streamed into the store, which has a limit of its own
    )
    app.state.replicas = Replicas()
    app.add_middleware(metrics.RequestMetrics)
    return app


def _policy(settings: RegistrySettings) -> RegistryPolicy:
    return RegistryPolicy(
        limits=ArchiveLimits(
            members=settings.max_archive_members,
            unpacked_bytes=settings.max_unpacked_bytes,
            ratio=settings.max_archive_ratio,
        ),
        default_max_batch=settings.default_max_batch,
        pending_for=timedelta(seconds=settings.pending_artifact_s),
        packages=pickle_file.packages(settings.runtime_path),
    )


@contextlib.asynccontextmanager
async def _background(registrar: Registrar, probe_every_s: float) -> AsyncIterator[None]:
    tasks = [
        asyncio.create_task(_probe(registrar, probe_every_s), name="registry probe"),
        asyncio.create_task(_collect(registrar), name="registry collect"),
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _probe(registrar: Registrar, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await registrar.observe()


async def _collect(registrar: Registrar) -> None:
    while True:
        await registrar.collect()
        await asyncio.sleep(COLLECT_EVERY_S)
