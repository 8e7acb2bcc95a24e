"""OIP v2 beside inference: health, metadata, configuration, statistics, the list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.catalogue import EXTENSIONS, Catalogue
from services.gateway.core import Core
from services.gateway.domain.routing import require
from tidegate import __version__
from tidegate.errors import BadRequest

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])


def _catalogue(request: Request) -> Catalogue:
    catalogue: Catalogue = request.app.state.catalogue
    return catalogue


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name, version and protocol extensions of this server."""
    return {"name": "tidegate", "version": __version__, "extensions": EXTENSIONS}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """200 while the process answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(request: Request, response: Response) -> dict[str, bool]:
    """200 when requests can be routed and queued."""
    well = not request.app.state.health.problems()
    response.status_code = 200 if well else 503
    return {"ready": well}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The endpoints by name, with their versions."""
    core: Core = request.app.state.core
    table = require(core.routes.table)
    items = [{"name": e.name, "versions": sorted(e.versions, key=int)} for e in table.endpoints.values()]
    return {"models": sorted(items, key=lambda item: item["name"])}


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """Every model version, and whether it can answer (Triton's repository extension)."""
    return _catalogue(request).index()


@router.post("/repository/models/{model}/{action}")
async def manage(model: str, action: str) -> None:
    """Refused: clients that infer do not load or unload models."""
    raise BadRequest(
        f"{action} of {model!r} is not for inference clients: use `tidegate deploy` and `tidegate delete`"
    )


@router.get("/{kind}sharedmemory/status")
@router.get("/{kind}sharedmemory/region/{name}/status")
async def shared_memory(kind: str, name: str = "") -> list[str]:
    """No region is ever registered."""
    return []


@router.post("/{kind}sharedmemory/{rest:path}")
async def register_shared_memory(kind: str, rest: str) -> None:
    """Refused: the model may run on another host than its caller."""
    raise BadRequest("shared memory regions are not supported: the model may run on another host")


@router.api_route("/logging", methods=["GET", "POST"])
@router.api_route("/trace/setting", methods=["GET", "POST"])
@router.api_route("/models/{model}/trace/setting", methods=["GET", "POST"])
async def operators_settings(model: str = "") -> None:
    """Refused: log and trace settings are not for inference clients."""
    raise BadRequest("log and trace settings are not for inference clients")


@router.get("/models/stats")
@router.get("/models/{model}/stats")
@router.get("/models/{model}/versions/{version}/stats")
async def model_statistics(request: Request, model: str = "", version: str = "") -> dict[str, Any]:
    """Counts and durations over all replicas, in Triton's schema; of every version when none is named."""
    return await _catalogue(request).statistics(model, version)


@router.get("/models/{model}/config")
@router.get("/models/{model}/versions/{version}/config")
async def model_config(request: Request, model: str, version: str = "") -> dict[str, Any]:
    """The model's configuration as its Triton completed it; 503 before that is known."""
    return await _catalogue(request).config(model, version)


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(
    request: Request, response: Response, model: str, version: str = ""
) -> dict[str, str | bool]:
    """200 when a request would be answered: by a ready replica, or by one that it wakes."""
    well = _catalogue(request).is_ready(model, version)
    response.status_code = 200 if well else 503
    return {"name": model, "ready": well}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str, version: str = "") -> dict[str, Any]:
    """Inputs, outputs and versions of a model."""
    return _catalogue(request).metadata(model, version)
