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

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.reporter import Reporter
from services.gateway.adapters.routes import Routes
from services.gateway.api import models
from services.gateway.api.direct import DirectProtocol
from services.gateway.api.infer import InferDoor
from services.gateway.api.inference import Inference
from services.gateway.api.metrics import Metrics
from services.gateway.core import Core
from services.gateway.settings import GatewaySettings
from tidegate.service import LOOPBACK, create_app
from tidegate.store import Store


class Gateway(NamedTuple):
    """The gateway as an ASGI app, whose parts start and stop with its lifespan, and its short way."""

    app: ASGIApp
    protocol: Callable[..., asyncio.Protocol]


def build(settings: GatewaySettings) -> Gateway:
    """The gateway of these settings."""
    incarnation = os.urandom(8)
    store = Store.connect(settings.redis_url)
    dispatcher = Dispatcher(
        settings.amqp_url,
        incarnation,
        lambda name: reporter.fleet(name),
        max_frames=settings.envelope_max_frames,
    )
    metrics = Metrics()
    reporter = Reporter(
        store, incarnation.hex(), settings.report_interval_s, dispatcher.loads, metrics.report
    )
    routes = Routes(store, settings.state_path / "data" / "gateway-routes.json")
    core = Core(routes, dispatcher, reporter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.core = core
        app.state.health.add("routes", routes.problem)
        app.state.health.add("broker", dispatcher.problem)
        await routes.start()
        dispatcher.start()
        await reporter.start()
        yield
        await dispatcher.stop()
        await reporter.stop()
        await routes.stop()
        await store.close()

    app = create_app(
        name="gateway", settings=settings, lifespan=lifespan, routers=[models.router], open_paths=("/v2",)
    )
    inference = Inference(
        core,
        max_body_bytes=settings.max_body_bytes,
        local_only=settings.host in LOOPBACK,
        metrics=metrics,
    )
    return Gateway(InferDoor(app, inference), partial(DirectProtocol, inference))
