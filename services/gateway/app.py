"""Build the gateway from its parts, and start and stop them."""

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
from services.gateway.adapters.copy_publisher import CopyPublisher
from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.heartbeat import Heartbeat
from services.gateway.adapters.model_metadata import ModelMetadataCache
from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.adapters.store.sequences import SequencePlaces
from services.gateway.adapters.traffic_publisher import TrafficPublisher
from services.gateway.api import cors, home, models
from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.cors import CrossOriginHandler
from services.gateway.api.feedback import BODY_BYTES as FEEDBACK_BYTES
from services.gateway.api.generate import GenerateRoutes
from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.inference import GrpcInference
from services.gateway.api.grpc.server import GrpcServer
from services.gateway.api.grpc.service import InferenceService
from services.gateway.api.grpc.tf_serving import TfServing
from services.gateway.api.inference import openapi
from services.gateway.api.inference.asgi_fallback import AsgiFallback
from services.gateway.api.inference.handler import InferenceHandler
from services.gateway.api.inference.hot_path import HotPathProtocol
from services.gateway.api.llm.error_forms import ERROR_FORMS
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.api.rows.errors import ROWS_ERROR_FORMS, rows_error_at
from services.gateway.application.access_log import AccessLog, access_log_of
from services.gateway.application.catalogue import Catalogue
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.inference.shadow_traffic import ShadowTraffic
from services.gateway.application.request_traces import request_traces_of
from services.gateway.domain.cors import Origins
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.request_costs import RequestCosts
from services.gateway.feedback_wiring import FeedbackWiring
from services.gateway.job_wiring import JobWiring
from services.gateway.llm_wiring import LLM_BODIES, LlmWiring
from services.gateway.rows_wiring import ROWS_BODIES, rows_routers
from services.gateway.settings import GatewaySettings
from services.gateway.triton_wiring import TritonWiring, permissions_of
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.http.heads import LOOPBACK
from tidegate.kernel.http.tls import ServerCertificate, certificate_of
from tidegate.kernel.service import handover
from tidegate.kernel.service.api import create_app
from tidegate.kernel.service.app import Health
from tidegate.kernel.store import Store
from tidegate.kernel.tracing import SpanExport

# The limit for a gRPC message is this many bytes higher than the limit for bodies, because a message also has
# fields other than the tensors.
HEAD_BYTES = 64 * 1024

# The most bytes of a body, except on the STREAMED paths, which have their own limits. This limit is low for
# two reasons: the memory budget does not count these bodies, and callers on loopback can send them without a
# credential.
API_BODY_BYTES = 64 * 1024
STREAMED = (
    {
        r"/v2/models/.*/generate(_stream)?": None,
        r"/v1/batches": None,
        r"/v1/files": None,
        r"/v1/feedback": FEEDBACK_BYTES,
        r"/api/.*": None,
    }
    | LLM_BODIES
    | ROWS_BODIES
)


class Gateway(NamedTuple):
    """A gateway process.

    ``app``: an ASGI app; its lifespan starts and stops the parts. ``protocol``: the HTTP protocol that serves
    inference requests quickly, without ``app``. To stop the gateway, call ``drain`` first. After that,
    ``busy`` returns True until all gRPC connections have ended.
    """

    app: ASGIApp
    protocol: Callable[..., asyncio.Protocol]
    tls: ssl.SSLContext | None
    drain: Callable[[], Awaitable[None]]
    busy: Callable[[], bool]


class Parts(NamedTuple):
    """The parts of the gateway that exist as long as the process."""

    store: Store
    blobs: Blobs
    limits: BodyLimits
    metrics: GatewayMetrics
    routes: RouteTableCache
    dispatcher: Dispatcher
    heartbeat: Heartbeat
    traffic: TrafficPublisher
    core: InferenceCore
    shadows: ShadowTraffic
    metadata: ModelMetadataCache
    catalogue: Catalogue
    access_wiring: AccessWiring
    job_wiring: JobWiring
    log: AccessLog
    traces: SpanExport | None
    feedback: FeedbackWiring
    costs: RequestCosts | None
    triton: TritonWiring


def build(settings: GatewaySettings) -> Gateway:
    """Build the gateway from its settings."""
    certificate = certificate_of(settings)
    parts = _parts(settings)
    origins = Origins.of(settings.cors_origins)
    app = _rest_app(settings, parts, origins, certificate)
    handler = _inference_handler(settings, parts, origins)
    tls = None if certificate is None else certificate.context("http/1.1")

    async def drain() -> None:
        # The lifespan ends only after the last HTTP request. That is too late for gRPC, which would accept
        # new calls until then.
        app.state.grpc.drain()

    return Gateway(
        AsgiFallback(app, handler), partial(HotPathProtocol, handler), tls, drain, lambda: app.state.grpc.busy
    )


def _rest_app(
    settings: GatewaySettings, parts: Parts, origins: Origins, certificate: ServerCertificate | None
) -> FastAPI:
    access = parts.access_wiring.access
    generate = GenerateRoutes(parts.core, access, parts.limits, parts.metrics, parts.log)
    accounting, jobs = parts.access_wiring.llm_accounting, parts.job_wiring.llm
    llm = LlmWiring(settings, parts.core, accounting, parts.limits, parts.metrics, parts.log, jobs)
    app = create_app(
        name="gateway",
        settings=settings,
        lifespan=lambda app: _running(app, settings, parts, certificate),
        routers=[
            home.router(access),
            models.health,
            models.router,
            generate.router,
            *parts.triton.routers,
            # The routers of ``rows_routers`` and of OpenAI's API share the path ``/v1/models/NAME``. Those of
            # ``rows_routers`` come first, because they pass requests for language models on to OpenAI's
            # routers.
            *rows_routers(
                parts.core,
                access,
                parts.limits,
                parts.metrics,
                parts.log,
                parts.catalogue,
                parts.job_wiring,
                parts.triton.control,
                llm.openai.model,
            ),
            *llm.routers,
            *parts.job_wiring.routers,
            parts.feedback.router,
            parts.access_wiring.router,
        ],
        permissions=permissions_of(settings),
        identify=access.authenticate,
        front=openapi.PATHS,
        body_bytes=API_BODY_BYTES,
        larger_bodies=STREAMED,
        origins=origins,
        answer_error=lambda path, error, rid: (
            rows_error_at(path, error) or llm.answer_error(path, error, rid)
        ),
        error_forms=ERROR_FORMS | ROWS_ERROR_FORMS,
    )
    if origins:
        cors.allow(app, origins)
    return app


def _inference_handler(settings: GatewaySettings, parts: Parts, origins: Origins) -> InferenceHandler:
    return (partial(CrossOriginHandler, origins) if origins else InferenceHandler)(
        parts.core,
        access=parts.access_wiring.access,
        limits=parts.limits,
        local_only=settings.host in LOOPBACK,
        metrics=parts.metrics,
        log=parts.log,
        labels=parts.metadata.labels,
        jobs=parts.job_wiring.submission,
        body_bytes_per_s=settings.http_body_bytes_per_s,
        costs=parts.costs,
        beside=parts.triton.beside,
    )


def _body_limits(settings: GatewaySettings) -> BodyLimits:
    return BodyLimits(
        body_bytes=settings.max_body_bytes,
        json_bytes=settings.max_json_bytes,
        bodies=MemoryBudget(settings.max_inflight_bytes),
        answers=MemoryBudget(settings.max_inflight_bytes),
    )


def _parts(settings: GatewaySettings) -> Parts:
    incarnation = os.urandom(8)
    store, blobs = Store.connect(settings.redis_url), Blobs(settings.blob_url)
    routes = RouteTableCache(store, settings.state_path / "data" / "gateway-routes.json")
    metrics, limits = GatewayMetrics(lambda: routes.table), _body_limits(settings)
    dispatcher = Dispatcher(
        settings.amqp_url,
        incarnation,
        lambda name: heartbeat.fleet(name),
        claims=Claims(blobs, settings.claim_above_bytes),
        answers=limits.answers,
        max_frames=settings.envelope_max_frames,
    )
    shadows = ShadowTraffic(
        CopyPublisher(dispatcher, incarnation),
        fleet=lambda name: heartbeat.fleet(name),
        outstanding=dispatcher.outstanding,
        gateways=lambda: heartbeat.gateways,
        wake=dispatcher.demand,
        table=lambda: routes.table,
        count=metrics.copied,
        largest=settings.claim_above_bytes,
        host_busy=settings.shadow_host_busy,
    )
    heartbeat = Heartbeat(
        store,
        incarnation.hex(),
        settings.report_interval_s,
        dispatcher.loads,
        metrics.report,
        dispatcher.on_fleets,
        metrics.variants.report,
        shadows.report,
    )
    feedback = FeedbackWiring(settings, routes)
    costs = RequestCosts()
    places = SequencePlaces.connect(settings.redis_url)
    core = InferenceCore(routes, dispatcher, heartbeat, feedback.tags, shadows, costs, places)
    metadata = ModelMetadataCache(store, routes.deployments)
    traces, export = request_traces_of(settings.trace_slow_ms)
    log = access_log_of(settings, traces)
    access_wiring = AccessWiring(settings, incarnation.hex(), lambda: heartbeat.gateways, costs)
    traffic = TrafficPublisher(store, incarnation.hex(), metrics.traffic.report)
    access_wiring.watch_callers(traffic.seen)
    job_wiring = JobWiring(
        settings,
        incarnation.hex(),
        core,
        access_wiring.access,
        access_wiring.llm_accounting,
        blobs,
        metadata.labels,
        limits,
        log,
    )
    return Parts(
        store=store,
        blobs=blobs,
        limits=limits,
        metrics=metrics,
        routes=routes,
        dispatcher=dispatcher,
        heartbeat=heartbeat,
        traffic=traffic,
        core=core,
        shadows=shadows,
        metadata=metadata,
        catalogue=Catalogue(core, metadata, store),
        access_wiring=access_wiring,
        job_wiring=job_wiring,
        log=log,
        traces=export,
        feedback=feedback,
        costs=costs if settings.cost_header else None,
        triton=TritonWiring(settings, core, limits, traced=export is not None),
    )


@asynccontextmanager
async def _running(
    app: FastAPI, settings: GatewaySettings, parts: Parts, certificate: ServerCertificate | None
) -> AsyncIterator[None]:
    app.state.core = parts.core
    app.state.catalogue = parts.catalogue
    app.state.health.add("routes", parts.routes.problem)
    app.state.health.add("broker", parts.dispatcher.problem)
    parts.log.start()
    await parts.routes.start()
    await parts.access_wiring.start(app)
    parts.dispatcher.start()
    parts.shadows.start()
    parts.job_wiring.start()
    await parts.heartbeat.start()
    parts.traffic.start()
    parts.metadata.start()
    app.state.grpc = grpc = _grpc_server(settings, parts, app.state.health, certificate)
    await handover.until_ready(app.state.health.problems)
    await grpc.start()
    handover.report_ready()
    watch = None if certificate is None else asyncio.create_task(certificate.watch())
    yield
    if watch is not None:
        watch.cancel()
    await grpc.stop()
    await parts.metadata.stop()
    await parts.job_wiring.stop()
    await parts.shadows.stop()
    await parts.core.sequences.stop()
    await parts.dispatcher.stop()
    await parts.heartbeat.stop()
    await parts.traffic.stop()
    await parts.access_wiring.stop()
    await parts.triton.stop()
    await parts.routes.stop()
    await parts.log.stop()
    if parts.traces is not None:
        await asyncio.to_thread(parts.traces.close)
    await parts.feedback.stop()
    await parts.store.close()
    parts.blobs.close()


def _grpc_server(
    settings: GatewaySettings, parts: Parts, health: Health, certificate: ServerCertificate | None
) -> GrpcServer:
    access = parts.access_wiring.access
    calls = GrpcInference(
        parts.core, access, parts.metadata, parts.metrics, parts.log, parts.costs, parts.triton.beside
    )
    most = settings.max_body_bytes + HEAD_BYTES
    return GrpcServer(
        [
            InferenceService(calls, parts.catalogue, health, parts.triton.methods, max_bytes=most),
            TfServing(calls, parts.catalogue, max_bytes=most),
        ],
        HealthService(health),
        host=settings.host,
        port=settings.gateway_grpc_port,
        authenticate=access.authenticate,
        limits=parts.limits,
        refused=calls.refused_by_head,
        max_connections=settings.max_grpc_connections,
        shared_port=processes.MEMBER in os.environ,
        sock=handover.inherited("grpc"),
        tls=None if certificate is None else certificate.context("h2"),
    )
