"""Make the FastAPI app of a service: its routes, health, metrics, guard and error answers."""

from __future__ import annotations

from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.permissions import SERVICES, RoutePermissions
from tidegate.kernel.service import api_page
from tidegate.kernel.service.app import DOCS, METRICS, OWN_PATHS, Lifespan, answered, furnish
from tidegate.kernel.service.body_limit import BodyLimit
from tidegate.kernel.service.guard import AnswerError, Identify
from tidegate.kernel.service.openapi import ErrorForm, document
from tidegate.kernel.settings.base import Settings
from tidegate.kernel.settings.report import report
from tidegate.version import VERSION


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return the body as JSON. Raises JSONDecodeError, also for NaN, 1e400 and half a surrogate pair."""
        return orjson.loads(await self.body())


class JsonRoute(APIRoute):
    """A route that reads JSON strictly (RFC 8259). Use it for routers whose routes have bodies.

    Python's own reader also accepts values that cannot be written as JSON. They would cause an error only
    later, in the database or in the answer.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler for this route. It reads the body with the strict reader."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


def create_app(
    *,
    name: str,
    settings: Settings,
    lifespan: Lifespan,
    routers: Sequence[APIRouter],
    permissions: RoutePermissions | None = None,
    identify: Identify | None = None,
    front: Mapping[str, Any] | None = None,
    body_bytes: int | None = None,
    larger_bodies: Mapping[str, int | None] = MappingProxyType({}),
    origins: Container[object] = frozenset(),
    answer_error: AnswerError | None = None,
    error_forms: Mapping[str, ErrorForm] = MappingProxyType({}),
) -> FastAPI:
    """Return an app with the routes of ``routers``, and with health, metrics, guard and error answers.

    - ``identify``: a function that returns the principal of a request's headers; None: only the service token
      is accepted.
    - ``permissions``: the table of scopes; None: that of the service ``name``.
    - ``front``: the OpenAPI paths of routes that another layer answers before a request reaches the app.
    - ``body_bytes``: the maximum size of a body in bytes; None: the limit in the settings.
    - ``larger_bodies``: paths with other limits, see :class:`BodyLimit`.
    - ``origins``: the origins of browser pages that may call the app.
    - ``answer_error``: a function that makes the answer to a failed request; None: the answer has Tidegate's
      format.
    - ``error_forms``: the form of errors of routes that follow another API, by the OpenAPI tag of these
      routes.
    """
    permissions = permissions or SERVICES[name]
    app = FastAPI(
        title=f"Tidegate {name}",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # because the guard removes one trailing slash
    )
    # The middleware that is added last runs first. So add the limit before the guard: then the guard runs
    # first, and the body of a refused request is not read.
    most = settings.max_api_body_bytes if body_bytes is None else body_bytes
    app.add_middleware(BodyLimit, most=most, larger=larger_bodies)
    furnish(
        app,
        name=name,
        settings=settings,
        permissions=permissions,
        identify=identify,
        origins=origins,
        answer_error=answer_error,
    )
    app.add_api_route(DOCS, _page, include_in_schema=False)
    for path, answer in OWN_PATHS.items():
        documented = path != METRICS
        app.add_api_route(path, answer, tags=["health"], response_model=None, include_in_schema=documented)
    for router in (_settings_router(settings), *routers):
        app.include_router(router)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    _describe(app, permissions, front or {}, error_forms)
    return app


def _settings_router(settings: Settings) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["settings"])

    @router.get("/settings")
    def list_settings() -> dict[str, Any]:
        """Return every setting of this service: its value, its source, and its value after a restart."""
        return report(settings)

    return router


def _describe(
    app: FastAPI,
    permissions: RoutePermissions,
    front: Mapping[str, Any],
    error_forms: Mapping[str, ErrorForm],
) -> None:
    @lru_cache(maxsize=1)
    def openapi() -> dict[str, Any]:
        return document(app, permissions, front, error_forms)

    app.openapi = openapi  # type: ignore[method-assign]


async def _page(request: Request) -> Response:
    return HTMLResponse(api_page.page(request.app.openapi()), headers=api_page.HEADERS)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return answered(request, BadRequest(explain_validation(error.errors())))


def _no_object(finding: Any) -> str:
    if isinstance(finding.get("input"), bytes):
        return "the body was not read as JSON: send 'Content-Type: application/json'"
    where = ".".join(str(step) for step in finding["loc"] if step != "body") or "the body"
    return f"{where} must be a JSON object"


def _no_json(finding: Any) -> str:
    why = bounded_json.plain(finding["ctx"]["error"])
    return f"the body is not JSON: {why} (character {finding['loc'][-1]})"


# Messages for findings that pydantic or FastAPI describe poorly.
_WORDS: dict[str, Callable[[Any], str]] = {
    "json_invalid": _no_json,
    "model_attributes_type": _no_object,
    "model_type": _no_object,
    "dict_type": _no_object,
}


def explain_validation(found: Sequence[Any]) -> str:
    """Return pydantic's list of findings as one text: the field, the error and the value of each finding."""
    parts = []
    for finding in found[:5]:
        if (known := _WORDS.get(finding["type"])) is not None:
            parts.append(known(finding))
            continue
        where = ".".join(str(step) for step in finding["loc"] if step != "body") or "body"
        given = finding.get("input")
        shown = f" (given: {str(given)[:80]!r})" if isinstance(given, str | int | float | bool) else ""
        parts.append(f"{where}: {finding['msg']}{shown}")
    return "; ".join(parts)
