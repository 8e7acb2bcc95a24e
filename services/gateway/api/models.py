"""Serve OIP v2 except inference: health, metadata, configuration, statistics, the list of models."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response

from services.gateway.api.request_body import small_body
from services.gateway.application.catalogue import EXTENSIONS, SERVER_NAME, Catalogue
from services.gateway.application.inference.core import InferenceCore
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden
from tidegate.kernel.http.answers import error_body
from tidegate.kernel.protocol.access import INFER, PUBLISH, Principal, may_not_use
from tidegate.kernel.protocol.bounded_json import plain
from tidegate.kernel.service import caller
from tidegate.version import VERSION


async def _caller(request: Request) -> Principal:
    """Return the caller; raise Forbidden if it may not use the model in the path.

    If the path names no model, the caller needs only the scope `infer`. For `/ready`, the scope `publish` is
    also enough, because `tidegate deploy` calls it until the model is ready.
    """
    ready = request.scope["route"].path.endswith("}/ready")
    principal = caller.require(INFER, PUBLISH) if ready else caller.require(INFER)
    model = request.path_params.get("model")
    if model is not None and not principal.may(INFER, model) and not (ready and principal.may(PUBLISH)):
        raise Forbidden(may_not_use(principal, model))
    return principal


Caller = Annotated[Principal, Depends(_caller)]

health = APIRouter(prefix="/v2/health", tags=["Open Inference Protocol v2"])
router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"], dependencies=[Depends(_caller)])


def _catalogue(request: Request) -> Catalogue:
    catalogue: Catalogue = request.app.state.catalogue
    return catalogue


def _only_ready(body: bytes) -> bool:
    """Return the field ``ready`` in the body of ``/repository/index``; raise BadRequest if it is invalid."""
    try:
        request = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {plain(error)}") from None
    if not isinstance(request, dict):
        raise BadRequest("the request must be a JSON object")
    ready = request.get("ready", False)
    if not isinstance(ready, bool):
        raise BadRequest(f"'ready' must be true or false, got {type(ready).__name__}")
    return ready


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Return name, version and protocol extensions of this server."""
    return {"name": SERVER_NAME, "version": VERSION, "extensions": EXTENSIONS}


@health.get("/live")
async def live() -> dict[str, bool]:
    """Answer 200 while the process runs."""
    return {"live": True}


@health.get("/ready")
async def ready(request: Request, response: Response) -> dict[str, bool]:
    """Answer 200 if requests can be routed and queued, else 503."""
    healthy = not request.app.state.health.problems()
    response.status_code = 200 if healthy else 503
    return {"ready": healthy}


@router.get("/models")
async def models(request: Request, principal: Caller) -> dict[str, Any]:
    """Return the endpoints that the caller may use, sorted by name, with their versions."""
    core: InferenceCore = request.app.state.core
    endpoints = core.table().endpoints.values()
    items = [{"name": e.name, "versions": sorted(e.versions, key=int)} for e in endpoints]
    allowed = [item for item in items if principal.may(INFER, str(item["name"]))]
    return {"models": sorted(allowed, key=lambda item: item["name"])}


@router.post("/repository/index")
async def index(request: Request, principal: Caller) -> list[dict[str, str]]:
    """Return every model version and whether it is ready (Triton's repository extension).

    With the body ``{"ready": true}``, return only the ready ones.
    """
    ready = _only_ready(await small_body(request))
    return [entry for entry in _catalogue(request).index(ready=ready) if principal.may(INFER, entry["name"])]


@router.get("/models/stats")
@router.get("/models/{model}/stats")
@router.get("/models/{model}/versions/{version}/stats")
async def model_statistics(
    request: Request, principal: Caller, model: str = "", version: str = ""
) -> dict[str, Any]:
    """Return the counts and durations of inference requests, in Triton's schema.

    They cover all replicas of a version. If ``version`` is empty, return them for all versions; if ``model``
    is empty, for all models.
    """
    statistics = await _catalogue(request).statistics(model, version)
    return {
        "model_stats": [entry for entry in statistics["model_stats"] if principal.may(INFER, entry["name"])]
    }


@router.get("/models/{model}/config")
@router.get("/models/{model}/versions/{version}/config")
async def model_config(request: Request, model: str, version: str = "") -> dict[str, Any]:
    """Return the model's configuration as completed by Triton. Answer 503 before it is known."""
    return await _catalogue(request).config(model, version)


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(
    request: Request, response: Response, model: str, version: str = ""
) -> dict[str, str | bool]:
    """Answer 200 if a replica is ready, or if a request would start one; else 503 with ``error``."""
    why = _catalogue(request).not_ready(model, version)
    response.status_code = 503 if why else 200
    body: dict[str, str | bool] = {"name": model, "ready": not why}
    if why:
        body |= error_body(f"{model} is not ready: {why}", "not_ready", telemetry.request_id.get())
    return body


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str, version: str = "") -> dict[str, Any]:
    """Return the inputs, outputs and versions of a model. Answer 503 before its signature is known."""
    return _catalogue(request).metadata(model, version)
