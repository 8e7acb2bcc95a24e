"""Serve Triton's trace and log settings over HTTP. They are read-only here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, Request

from services.gateway.api.request_body import small_body
from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain import server_settings
from services.gateway.domain.server_settings import LOG_REMEDY, TRACE_REMEDY
from tidegate.kernel.errors import BadRequest, Forbidden
from tidegate.kernel.protocol.access import INFER, Principal, may_not_use
from tidegate.kernel.protocol.bounded_json import plain
from tidegate.kernel.service import caller


class ServerSettings:
    """The settings in Triton's form. ``traced``: True if the gateway exports traces."""

    def __init__(self, log_level: str, core: InferenceCore, *, traced: bool) -> None:
        self.log = server_settings.log_settings(log_level)
        self._trace = server_settings.trace_settings(on=traced)
        self._core = core

    def trace(self, model: str, principal: Principal) -> dict[str, Any]:
        """Return the trace settings, which are the same for the server (``model`` is empty) and each model.

        Raise Forbidden if the caller may not use the model. Raise NotFound if there is no such model.
        """
        if model:
            if not principal.may(INFER, model):
                raise Forbidden(may_not_use(principal, model))
            self._core.find(model, "")
        return self._trace


class ServerSettingsRoutes:
    """The routes of trace and log settings."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self.router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])
        add = self.router.add_api_route
        add("/logging", self.logging, methods=["GET"])
        add("/logging", self.change_logging, methods=["POST"])
        for path in ("/trace/setting", "/models/{model}/trace/setting"):
            add(path, self.tracing, methods=["GET"])
            add(path, self.change_tracing, methods=["POST"])

    async def logging(self) -> dict[str, Any]:
        """Return the log settings."""
        return self._settings.log

    async def change_logging(self, request: Request) -> dict[str, Any]:
        """Return the log settings. Refuse a request that would change them."""
        return await _unchanged(request, self._settings.log, LOG_REMEDY)

    async def tracing(self, model: str = "") -> dict[str, Any]:
        """Return the trace settings, which are the same for the server and each model."""
        return self._settings.trace(model, caller.current.get().principal)

    async def change_tracing(self, request: Request, model: str = "") -> dict[str, Any]:
        """Return the trace settings. Refuse a request that would change them."""
        present = self._settings.trace(model, caller.current.get().principal)
        return await _unchanged(request, present, TRACE_REMEDY)


async def _unchanged(request: Request, present: dict[str, Any], remedy: str) -> dict[str, Any]:
    body = await small_body(request)
    try:
        given = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {plain(error)}") from None
    if not isinstance(given, Mapping):
        raise BadRequest("the request must be a JSON object")
    server_settings.check_update(present, given, remedy)
    return present
