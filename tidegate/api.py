"""The FastAPI app of a service that has an API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from tidegate import __version__, telemetry
from tidegate.body_limit import BodyLimit
from tidegate.errors import BadRequest
from tidegate.service import METRICS, OWN_PATHS, Identify, Lifespan, error_response, furnish
from tidegate.settings import Settings


def create_app(
    *,
    name: str,
    settings: Settings,
    lifespan: Lifespan,
    routers: Sequence[APIRouter],
    open_paths: tuple[str, ...] = (),
    identify: Identify | None = None,
    larger_bodies: Mapping[str, int | None] = MappingProxyType({}),
) -> FastAPI:
    """The app with these routes, and with health, metrics, guard and error answers in place.

    ``identify``: who sends these headers; None: only holders of the service token are answered.
    ``larger_bodies``: paths that take more than the usual body, see :class:`BodyLimit`.
    """
    app = FastAPI(title=f"Tidegate {name}", version=__version__, lifespan=lifespan)
    # Before the guard, which so stands in front of it: nothing is read of a caller that is not admitted.
    app.add_middleware(BodyLimit, most=settings.max_api_body_bytes, larger=larger_bodies)
    furnish(app, name=name, settings=settings, open_paths=open_paths, identify=identify)
    for path, answer in OWN_PATHS.items():
        told = path != METRICS
        app.add_api_route(path, answer, tags=["health"], response_model=None, include_in_schema=told)
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return app


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(BadRequest(explain_validation(error.errors())), telemetry.request_id.get())


def explain_validation(found: Sequence[Any]) -> str:
    """Pydantic's list of findings as one sentence: where, what was wrong, what was given."""
    parts = []
    for finding in found[:5]:
        where = ".".join(str(step) for step in finding["loc"] if step != "body") or "body"
        given = finding.get("input")
        shown = f" (given: {str(given)[:80]!r})" if isinstance(given, str | int | float | bool) else ""
        parts.append(f"{where}: {finding['msg']}{shown}")
    return "; ".join(parts)
