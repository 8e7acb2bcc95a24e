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
from services.gateway.adapters.reporter import Reporter
from services.gateway.adapters.routes import Routes
from services.gateway.api import models
from services.gateway.api.direct import DirectProtocol
from services.gateway.api.generate import Generate
from services.gateway.api.grpc.calls import Calls
from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.server import GrpcDoor
from services.gateway.api.grpc.service import InferenceService
from services.gateway.api.infer import InferDoor
from services.gateway.api.inference import Inference
from services.gateway.api.limits import Limits
from services.gateway.api.metrics import Metrics
from services.gateway.catalogue import Catalogue
from services.gateway.core import Core
from services.gateway.domain.budget import Budget
from services.gateway.settings import GatewaySettings
from tidegate.blobs import Blobs
from tidegate.claims import Claims
from tidegate.service import LOOPBACK, Health, create_app
from tidegate.store import Store


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
    dispatcher = Dispatcher(
        settings.amqp_url,
        incarnation,
        lambda name: reporter.fleet(name),
        claims=Claims(blobs, settings.claim_above_bytes),
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

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.core = core
        app.state.catalogue = catalogue
        app.state.health.add("routes", routes.problem)
        app.state.health.add("broker", dispatcher.problem)
        await routes.start()
        dispatcher.start()
        await reporter.start()
        cards.start()
        grpc = _grpc_door(settings, Calls(core, cards, limits, metrics), catalogue, app.state.health)
        await grpc.start()
        yield
        await grpc.stop()
        await cards.stop()
        await dispatcher.stop()
        await reporter.stop()
        await routes.stop()
        await store.close()
        blobs.close()

    app = create_app(
        name="gateway",
        settings=settings,
        lifespan=lifespan,
        routers=[models.router, Generate(core, limits, metrics).router],
        open_paths=("/v2",),
    )
    inference = Inference(
        core,
        limits=limits,
        local_only=settings.host in LOOPBACK,
        metrics=metrics,
        labels=cards.labels,
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
