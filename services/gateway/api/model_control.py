"""Serve Triton's model control over HTTP: load and unload."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from services.gateway.api.request_body import small_body
from services.gateway.application.inference.core import parse_timeout
from services.gateway.application.model_control import ModelControl
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.bounded_json import plain
from tidegate.kernel.service import caller


class ModelControlRoutes:
    """The routes that load and unload models, as in Triton's model repository."""

    def __init__(self, control: ModelControl) -> None:
        self._control = control
        self.router = APIRouter(prefix="/v2/repository/models", tags=["Open Inference Protocol v2"])
        for action in (self.load, self.unload):
            self.router.add_api_route(
                f"/{{model}}/{action.__name__}", action, methods=["POST"], response_class=Response
            )

    async def load(self, request: Request, model: str) -> Response:
        """Start a model, even if it is paused, and answer when it is ready."""
        parameters = parameters_of(await small_body(request))
        header = request.headers.get("x-request-timeout-ms")
        timeout_ms = parse_timeout(None if header is None else header.encode("latin-1"))
        await self._control.load(model, parameters, caller.current.get().principal, timeout_ms)
        return Response()

    async def unload(self, request: Request, model: str) -> Response:
        """Keep a model at 0 replicas. Answer when it serves no more requests, at the latest after 60 s."""
        parameters_of(await small_body(request))
        await self._control.unload(model, caller.current.get().principal)
        return Response()


def parameters_of(body: bytes) -> dict[str, Any]:
    """Return the field ``parameters`` of a request. Raise BadRequest if the body is invalid."""
    try:
        request = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {plain(error)}") from None
    parameters = request.get("parameters", {}) if isinstance(request, dict) else None
    if not isinstance(parameters, dict):
        raise BadRequest("the request and its 'parameters' must be JSON objects")
    return parameters
