"""The router, put together."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from services.router.adapters.registry import Registry
from services.router.adapters.revision import Revision
from services.router.api import routes
from services.router.api.exceptions import Exceptions
from services.router.controller import Controller
from services.router.settings import RouterSettings
from services.router.sweeper import Sweeper
from tidegate.blobs import Blobs
from tidegate.service import create_app
from tidegate.store import Store


def build(settings: RouterSettings) -> FastAPI:
    """The router as an app; its loops start and stop with its lifespan."""
    data = settings.state_path / "data"
    store = Store.connect(settings.redis_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        controller = Controller(
            store,
            Registry(settings.registry_url, settings.service_token, data / "router-intention.json"),
            Revision(data / "router-revision.json"),
            settings.amqp_url,
            os.urandom(4).hex(),
            interval_s=settings.route_interval_s,
            relist_s=settings.relist_interval_s,
        )
        exceptions = Exceptions(settings.amqp_url, data / "dead-letters.jsonl", settings.dead_letters_kept)
        sweeper = Sweeper(Blobs(settings.blob_url), settings.blob_sweep_interval_s)
        app.state.controller, app.state.exceptions = controller, exceptions
        app.state.health.add("table", controller.problem)
        app.state.health.add("broker", lambda: controller.link.problem)
        app.state.health.add("exceptions", lambda: exceptions.link.problem or exceptions.out.problem)
        controller.start()
        exceptions.start()
        sweeper.start()
        yield
        await sweeper.stop()
        await exceptions.stop()
        await controller.stop()
        await store.close()

    return create_app(name="router", settings=settings, lifespan=lifespan, routers=[routes.router])
