"""OIP v2 beside inference: server and model health, metadata, the list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from services.gateway.core import Core
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, require
from tidegate import __version__
from tidegate.errors import BadRequest, NotFound

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

EXTENSIONS = ["binary_tensor_data", "model_repository(index)", "request_deadline"]


def _core(request: Request) -> Core:
    core: Core = request.app.state.core
    return core


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Name, version and protocol extensions of this server."""
    return {"name": "tidegate", "version": __version__, "extensions": EXTENSIONS}


@router.get("/health/live")
async def live() -> Response:
    """200 while the process answers."""
    return Response()


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 when requests can be routed and queued."""
    return Response(status_code=503 if request.app.state.health.problems() else 200)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The endpoints by name, with their versions."""
    table = require(_core(request).routes.table)
    items = [{"name": e.name, "versions": sorted(e.versions, key=int)} for e in table.endpoints.values()]
    return {"models": sorted(items, key=lambda item: item["name"])}


@router.post("/repository/index")
async def index(request: Request) -> list[dict[str, str]]:
    """Every model version, and whether it can answer (Triton's repository extension)."""
    core = _core(request)
    table = require(core.routes.table)
    return [
        {
            "name": e.name,
            "version": version,
            "state": "READY" if _is_ready(core, d) else "UNAVAILABLE",
            "reason": "",
        }
        for e in table.endpoints.values()
        for version, d in sorted(e.versions.items())
    ]


@router.post("/repository/models/{model}/{action}")
async def manage(model: str, action: str) -> None:
    """Refused: clients that infer do not load or unload models."""
    raise BadRequest(
        f"{action} of {model!r} is not for inference clients: use `tidegate deploy` and `tidegate delete`"
    )


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(request: Request, model: str, version: str = "") -> Response:
    """200 when a request would be answered: by a ready replica, or by one that it wakes."""
    core = _core(request)
    _, route = core.pick(model, version)
    return Response(status_code=200 if _is_ready(core, route) else 503)


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(request: Request, model: str, version: str = "") -> dict[str, Any]:
    """Inputs, outputs and versions of a model."""
    endpoint, route = _core(request).pick(model, version)
    return _metadata(endpoint, route)


def _is_ready(core: Core, route: DeploymentRoute) -> bool:
    return route.wakeable or core.reporter.fleet(route.name).ready > 0


def _metadata(endpoint: EndpointRoute, route: DeploymentRoute) -> dict[str, Any]:
    signature = route.contract.signature
    if signature is None:
        raise NotFound(f"the signature of {endpoint.name!r} is not known before its first replica is ready")
    batch = [-1] if signature.max_batch_size else []

    def shown(specs: Any) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": batch + s.shape} for s in specs]

    return {
        "name": endpoint.name,
        "versions": sorted(endpoint.versions, key=int),
        "platform": f"tidegate_{route.format}",
        "inputs": shown(signature.inputs),
        "outputs": shown(signature.outputs),
    }
