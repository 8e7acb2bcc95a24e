"""The gateway, put together."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

from fastapi import FastAPI
from starlette.types import ASGIApp

from services.gateway import processes
from services.gateway.access_wiring import AccessWiring
from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.heartbeat import Heartbeat
from services.gateway.adapters.model_metadata import ModelMetadataCache
from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.api import cors, home, models
from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.cors import CrossOriginHandler
from services.gateway.api.generate import GenerateRoutes
from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.api.grpc.server import GrpcServer
from services.gateway.api.grpc.service import InferenceService
from services.gateway.api.inference import openapi
from services.gateway.api.inference.asgi_fallback import AsgiFallback
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.hot_path import HotPathProtocol
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.application.access_log import AccessLog, access_log_of
from services.gateway.application.catalogue import Catalogue
from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain.cors import Origins
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.job_wiring import JobWiring
from services.gateway.settings import GatewaySettings
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.http.tls import ServerCertificate, certificate_of
from tidegate.kernel.service.api import create_app
from tidegate.kernel.service.app import LOOPBACK, Health
from tidegate.kernel.store import Store

# Room in a gRPC message beside a body of the limit.
HEAD_BYTES = 64 * 1024

# These read their bodies piece by piece, each within limits of its own.
# Bodies of all other paths are short questions. They are read beside the budget for bodies, and on loopback
# anybody may send them: a larger limit would be one for each connection.
API_BODY_BYTES = 64 * 1024
STREAMED = {r"/v2/models/.*/generate(_stream)?": None, r"/v1/batches": None, r"/api/.*": None}


class Gateway(NamedTuple):
    """The gateway as an ASGI app, whose parts start and stop with its lifespan, and its short way.

    ``drain``: to be called first when it is to stop.
    """

    app: ASGIApp
    protocol: Callable[..., asyncio.Protocol]
    tls: ssl.SSLContext | None
    drain: Callable[[], Awaitable[None]]


class Parts(NamedTuple):
    """What lives as long as the process."""

    store: Store
    blobs: Blobs
    limits: BodyLimits
    metrics: GatewayMetrics
    routes: RouteTableCache
    dispatcher: Dispatcher
    heartbeat: Heartbeat
    core: InferenceCore
    cards: ModelMetadataCache
    catalogue: Catalogue
    access_wiring: AccessWiring
    job_wiring: JobWiring
    log: AccessLog


def build(settings: GatewaySettings) -> Gateway:
    """The gateway of these settings."""
    certificate = certificate_of(settings)
    parts = _parts(settings)
    origins = Origins.of(settings.cors_origins)
    core, access, limits, metrics = parts.core, parts.access_wiring.access, parts.limits, parts.metrics
    app = create_app(
        name="gateway",
        settings=settings,
        lifespan=lambda app: _running(app, settings, parts, certificate),
        routers=[
            home.router(access),
            models.health,
            models.router,
            GenerateRoutes(core, access, limits, metrics, parts.log).router,
            *parts.job_wiring.routers,
            parts.access_wiring.router,
        ],
        identify=access.authenticate,
        front=openapi.PATHS,
        body_bytes=API_BODY_BYTES,
        larger_bodies=STREAMED,
        origins=origins,
    )
    inference = (partial(CrossOriginHandler, origins) if origins else InferenceHandler)(
        core,
        access=access,
        limits=limits,
        local_only=settings.host in LOOPBACK,
        metrics=metrics,
        log=parts.log,
        labels=parts.cards.labels,
        jobs=parts.job_wiring.submission,
        body_bytes_per_s=settings.http_body_bytes_per_s,
    )
    if origins:
        cors.allow(app, origins)
    tls = None if certificate is None else certificate.context("http/1.1")

    async def drain() -> None:
        # The lifespan ends after the last HTTP request; until then no client over gRPC would be told.
        app.state.grpc.drain()

    return Gateway(AsgiFallback(app, inference), partial(HotPathProtocol, inference), tls, drain)


def _parts(settings: GatewaySettings) -> Parts:
    incarnation = os.urandom(8)
    store, blobs, metrics = (
        Store.connect(settings.redis_url),
        Blobs(settings.blob_url),
        GatewayMetrics(lambda: routes.table),
    )
    limits = BodyLimits(
        body_bytes=settings.max_body_bytes,
        json_bytes=settings.max_json_bytes,
        bodies=MemoryBudget(settings.max_inflight_bytes),
        answers=MemoryBudget(settings.max_inflight_bytes),
    )
    dispatcher = Dispatcher(
        settings.amqp_url,
        incarnation,
        lambda name: heartbeat.fleet(name),
        claims=Claims(blobs, settings.claim_above_bytes),
        answers=limits.answers,
        max_frames=settings.envelope_max_frames,
    )
    heartbeat = Heartbeat(
        store,
        incarnation.hex(),
        settings.report_interval_s,
        dispatcher.loads,
        metrics.report,
        dispatcher.heard,
    )
    routes = RouteTableCache(store, settings.state_path / "data" / "gateway-routes.json")
    core = InferenceCore(routes, dispatcher, heartbeat)
    cards = ModelMetadataCache(store, routes.deployments)
    catalogue = Catalogue(core, cards, store)
    log = access_log_of(settings)
    access_wiring = AccessWiring(settings, incarnation.hex(), lambda: heartbeat.gateways)
    job_wiring = JobWiring(
        settings, incarnation.hex(), core, access_wiring.access, blobs, cards.labels, limits, log
    )
    return Parts(
        store,
        blobs,
        limits,
        metrics,
        routes,
        dispatcher,
        heartbeat,
        core,
        cards,
        catalogue,
        access_wiring,
        job_wiring,
        log,
    )


@asynccontextmanager
async def _running(
    app: FastAPI, settings: GatewaySettings, parts: Parts, certificate: ServerCertificate | None
) -> AsyncIterator[None]:
    core, cards = parts.core, parts.cards
    app.state.core = core
    app.state.catalogue = parts.catalogue
    app.state.health.add("routes", parts.routes.problem)
    app.state.health.add("broker", parts.dispatcher.problem)
    parts.log.start()
    await parts.routes.start()
    await parts.access_wiring.start(app)
    parts.dispatcher.start()
    parts.job_wiring.start()
    await parts.heartbeat.start()
    cards.start()
    app.state.grpc = grpc = _grpc_door(settings, parts, app.state.health, certificate)
    await grpc.start()
    watch = None if certificate is None else asyncio.create_task(certificate.watch())
    yield
    if watch is not None:
        watch.cancel()
    await grpc.stop()
    await cards.stop()
    await parts.job_wiring.stop()
    await parts.dispatcher.stop()
    await parts.heartbeat.stop()
    await parts.access_wiring.stop()
    await parts.routes.stop()
    await parts.log.stop()
    await parts.store.close()
    parts.blobs.close()


def _grpc_door(
    settings: GatewaySettings, parts: Parts, health: Health, certificate: ServerCertificate | None
) -> GrpcServer:
    access = parts.access_wiring.access
    calls = GrpcInference(parts.core, access, parts.cards, parts.metrics, parts.log)
    # The size of a message with a body of the limit, and some room for its head.
    inference = InferenceService(
        calls, parts.catalogue, health, max_bytes=settings.max_body_bytes + HEAD_BYTES
    )
    return GrpcServer(
        inference,
        HealthService(health),
        host=settings.host,
        port=settings.gateway_grpc_port,
        authenticate=access.authenticate,
        limits=parts.limits,
        refused=calls.refused_by_head,
        max_connections=settings.max_grpc_connections,
        shared_port=processes.MEMBER in os.environ,
        tls=None if certificate is None else certificate.context("h2"),
    )
