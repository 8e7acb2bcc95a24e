"""The gateway, put together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

from fastapi import FastAPI
from starlette.types import ASGIApp

from services.gateway import processes
from services.gateway.adapters.cards import Cards
from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.job_queue import JobQueue
from services.gateway.adapters.reporter import Reporter
from services.gateway.adapters.router import Router
from services.gateway.adapters.routes import Routes
from services.gateway.adapters.tally import Tally
from services.gateway.api import models
from services.gateway.api.batches import BatchesDoor
from services.gateway.api.direct import DirectProtocol
from services.gateway.api.generate import Generate
from services.gateway.api.grpc.calls import Calls
from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.server import GrpcDoor
from services.gateway.api.grpc.service import InferenceService
from services.gateway.api.infer import InferDoor
from services.gateway.api.inference import Inference
from services.gateway.api.job_answers import JobAnswers
from services.gateway.api.job_door import JobDoor
from services.gateway.api.jobs import JobsDoor
from services.gateway.api.limits import Limits
from services.gateway.api.metrics import Metrics
from services.gateway.api.webhooks import WebhooksDoor
from services.gateway.batches import Batches
from services.gateway.catalogue import Catalogue
from services.gateway.core import Core
from services.gateway.domain.budget import Budget
from services.gateway.gatehouse import Gatehouse
from services.gateway.jobs import Jobs
from services.gateway.results import Results
from services.gateway.settings import GatewaySettings
from tidegate.blobs import Blobs
from tidegate.claims import Claims
from tidegate.protocol.envelope import LARGE
from tidegate.service import LOOPBACK, Health, create_app
from tidegate.store import JobStore, Store
from tidegate.store.batches import BatchStore
from tidegate.store.webhooks import WebhookStore


class Gateway(NamedTuple):
    """The gateway as an ASGI app, whose parts start and stop with its lifespan, and its short way."""

    app: ASGIApp
    protocol: Callable[..., asyncio.Protocol]


def build(settings: GatewaySettings) -> Gateway:
    """The gateway of these settings."""
    incarnation = os.urandom(8)
    store = Store.connect(settings.redis_url)
    blobs = Blobs(settings.blob_url)
    bodies, answers = Budget(settings.max_inflight_bytes), Budget(settings.max_inflight_bytes)
    claims = Claims(blobs, settings.claim_above_bytes)
    dispatcher = Dispatcher(
        settings.amqp_url,
        incarnation,
        lambda name: reporter.fleet(name),
        claims=claims,
        answers=answers,
        max_frames=settings.envelope_max_frames,
    )
    metrics = Metrics()
    reporter = Reporter(
        store, incarnation.hex(), settings.report_interval_s, dispatcher.loads, metrics.report
    )
    routes = Routes(store, settings.state_path / "data" / "gateway-routes.json")
    core = Core(routes, dispatcher, reporter)
    cards = Cards(store, routes.deployments)
    catalogue = Catalogue(core, cards, store)
    limits = Limits(
        body_bytes=settings.max_body_bytes,
        json_bytes=settings.max_json_bytes,
        bodies=bodies,
        answers=answers,
    )
    gatehouse = Gatehouse(settings, incarnation.hex(), lambda: reporter.gateways)
    access = gatehouse.access
    job_store, job_queue = JobStore.connect(settings.jobs_url), JobQueue(settings.amqp_url)
    # What the store of the jobs holds it holds in memory.
    job_claims = Claims(blobs, min(settings.claim_above_bytes, LARGE))
    jobs = Jobs(
        core,
        job_store,
        job_queue,
        job_claims,
        ttl_s=settings.job_ttl_s,
        retention_s=settings.job_retention_s,
        most_waiting=settings.max_waiting_jobs,
    )
    results = Results(job_store, claims, cards.labels)
    job_answers = JobAnswers(results, reporter)
    batch_store = BatchStore.connect(settings.jobs_url)
    batches = Batches(
        batch_store, jobs, results, blobs, access, incarnation.hex(), keep_s=settings.job_retention_s
    )
    batches_door = BatchesDoor(
        batches,
        file_bytes=settings.max_batch_bytes,
        line_bytes=settings.max_json_bytes,
        lines=settings.max_batch_lines,
    )
    schedule = WebhookStore.connect(settings.jobs_url)
    router = Router(settings.router_url, settings.service_token)
    tally = Tally(job_store, incarnation.hex(), lambda: jobs.acknowledged)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.core = core
        app.state.catalogue = catalogue
        app.state.health.add("routes", routes.problem)
        app.state.health.add("broker", dispatcher.problem)
        await routes.start()
        await gatehouse.start(app)
        dispatcher.start()
        job_queue.start()
        tally.start()
        batches.start()
        await reporter.start()
        cards.start()
        grpc = _grpc_door(settings, Calls(core, access, cards, limits, metrics), catalogue, app.state.health)
        await grpc.start()
        yield
        await grpc.stop()
        await cards.stop()
        await batches.stop()
        await tally.stop()
        await jobs.stop()
        await job_queue.stop()
        await batch_store.close()
        await job_store.close()
        await schedule.close()
        await router.close()
        await dispatcher.stop()
        await reporter.stop()
        await gatehouse.stop()
        await routes.stop()
        await store.close()
        blobs.close()

    app = create_app(
        name="gateway",
        settings=settings,
        lifespan=lifespan,
        routers=[
            models.health,
            models.router,
            Generate(core, access, limits, metrics).router,
            JobsDoor(jobs, job_answers, access).router,
            batches_door.router,
            WebhooksDoor(jobs, schedule, router).router,
            gatehouse.router,
        ],
        open_paths=("/v2/health/",),
        identify=access.authenticate,
    )
    inference = Inference(
        core,
        access=access,
        limits=limits,
        local_only=settings.host in LOOPBACK,
        metrics=metrics,
        labels=cards.labels,
        jobs=JobDoor(jobs, job_answers, access),
    )
    return Gateway(InferDoor(app, inference), partial(DirectProtocol, inference))


def _grpc_door(settings: GatewaySettings, calls: Calls, catalogue: Catalogue, health: Health) -> GrpcDoor:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return GrpcDoor(
        InferenceService(calls, catalogue, health),
        HealthService(health),
        address=f"{host}:{settings.gateway_grpc_port}",
        max_bytes=settings.max_body_bytes,
        shared=processes.MEMBER in os.environ,
    )
