"""Build the APIs that other model servers have for tensors. They share one :class:`RowsDoor`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Response

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.api.rows.azure_ml import AzureMlRoutes
from services.gateway.api.rows.door import RowsDoor
from services.gateway.api.rows.sage_maker import SageMakerRoutes
from services.gateway.api.rows.sage_maker_async import SageMakerAsyncRoutes
from services.gateway.api.rows.tf_serving import TfServingRoutes
from services.gateway.api.rows.torch_serve import TorchServeRoutes
from services.gateway.application.access import Access
from services.gateway.application.access_log import AccessLog
from services.gateway.application.catalogue import Catalogue
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.model_control import ModelControl
from services.gateway.job_wiring import JobWiring

# URL paths of these APIs. They are a part of ``STREAMED`` in app.py. On these paths, request bodies may be
# larger than on other paths. The values are limits in bytes. None: the route limits the size itself.
ROWS_BODIES: dict[str, int | None] = {
    r"/v1/models/[^/]+(/(versions|labels)/[^/]+)?:(predict|classify|regress)": None,
    r"/predictions/.*|/invocations|/endpoints/.*|/models/[^/]+/invoke": None,
}


def rows_routers(
    core: InferenceCore,
    access: Access,
    limits: BodyLimits,
    metrics: GatewayMetrics,
    log: AccessLog,
    catalogue: Catalogue,
    jobs: JobWiring,
    control: ModelControl,
    openai: Callable[[str], Awaitable[Response]],
) -> list[APIRouter]:
    """Return the routers. ``openai`` answers ``GET /v1/models/{model}`` for a language model."""
    door = RowsDoor(core, access, limits, metrics, log)
    return [
        TfServingRoutes(door, catalogue, openai).router,
        TorchServeRoutes(door, control).router,
        SageMakerRoutes(door).router,
        SageMakerAsyncRoutes(
            door, access, limits, log, jobs.submitter, jobs.async_outputs, jobs.async_store
        ).router,
        AzureMlRoutes(door).router,
    ]
