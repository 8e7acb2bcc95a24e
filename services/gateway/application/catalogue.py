"""Return models and their metadata, for every API of the gateway."""

from __future__ import annotations

from typing import Any

from services.gateway.adapters.model_metadata import ModelMetadataCache
from services.gateway.application.inference.core import InferenceCore
from services.gateway.domain import admission
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from tidegate.kernel.errors import NotFound, TidegateError, Unavailable
from tidegate.kernel.protocol import statistics
from tidegate.kernel.store import Store

# Triton's clients expect this name.
SERVER_NAME = "triton"
EXTENSIONS = [
    "classification",
    "sequence",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
    "generate",
    "request_deadline",
]


class Catalogue:
    """The models under their public names, in Triton's format.

    The methods raise NotFound if the model or the version does not exist, and NoRoutes before the gateway has
    a route table. They raise Unavailable if the data is not known yet, or if a store is down.
    """

    def __init__(self, core: InferenceCore, metadata: ModelMetadataCache, store: Store) -> None:
        self._core = core
        self._metadata = metadata
        self._store = store

    def index(self, *, ready: bool = False) -> list[dict[str, str]]:
        """Return every model version with its state. With ``ready``, return only the ready versions."""
        found = [
            (endpoint.name, version, admission.state(route.wakeable, self._core.fleet(route.name)))
            for endpoint in self._core.table().endpoints.values()
            for version, route in sorted(endpoint.versions.items())
        ]
        return [
            {"name": name, "version": version, "state": state.word, "reason": state.reason}
            for name, version, state in found
            if not (state.reason and ready)
        ]

    def _not_ready(self, route: DeploymentRoute) -> str:
        return admission.state(route.wakeable, self._core.fleet(route.name)).reason

    def not_ready(self, model: str, version: str) -> str:
        """Return the reason why a model is not ready, or an empty string if it is ready.

        A model is ready if a replica is ready, or if a request would start one. If several Deployments share
        the traffic, one ready Deployment is enough. Raises NotFound if the model or the version does not
        exist.
        """
        endpoint, route = self._core.find(model, version)
        routes = [route] if version else list(endpoint.targets)
        reasons = [self._not_ready(each) for each in routes]
        return "" if "" in reasons else reasons[0]

    def metadata(self, model: str, version: str) -> dict[str, Any]:
        """Return the inputs, outputs and versions of a model.

        Raise Unavailable if the model's signature is unknown.
        """
        endpoint, route = self._core.find(model, version)
        signature = route.contract.signature
        if signature is None:
            raise self._not_known_yet("signature", endpoint, route)
        batch = [-1] if signature.max_batch_size else []

        def described(specs: Any) -> list[dict[str, Any]]:
            return [{"name": s.name, "datatype": s.datatype, "shape": batch + s.shape} for s in specs]

        return {
            "name": endpoint.name,
            "versions": sorted(endpoint.versions, key=int),
            "platform": f"tidegate_{route.format}",
            "inputs": described(signature.inputs),
            "outputs": described(signature.outputs),
        }

    async def config(self, model: str, version: str) -> dict[str, Any]:
        """Return a model's complete configuration, with the model's public name.

        Triton has added its own defaults to this configuration. Raise Unavailable before the first replica is
        ready.
        """
        endpoint, route = self._core.find(model, version)
        found = await self._metadata.get(route.name)
        if found is None:
            raise self._not_known_yet("configuration", endpoint, route)
        return found.config | {"name": endpoint.name}

    def _not_known_yet(self, what: str, endpoint: EndpointRoute, route: DeploymentRoute) -> TidegateError:
        """Request a replica, because only a ready replica reports the metadata. Return the error to raise."""
        error = Unavailable(
            f"the {what} of {endpoint.name!r} is not known until the first replica is ready",
            reason="not_known_yet",
            retry_after_s=1.0,
        )
        return self._core.needs_replica(route, error)

    async def statistics(self, model: str = "", version: str = "") -> dict[str, Any]:
        """Return the counts and durations of inference requests.

        They are those of one version, of all versions of a model, or of all models.
        """
        versions = self._versions(model, version)
        counts = await self._store.statistics([route.name for _, _, route in versions])
        return {
            "model_stats": [
                statistics.shown(endpoint.name, number, counts[route.name])
                for endpoint, number, route in versions
            ]
        }

    def _versions(self, model: str, version: str) -> list[tuple[EndpointRoute, str, DeploymentRoute]]:
        if version:
            endpoint, route = self._core.find(model, version)
            return [(endpoint, version, route)]
        table = self._core.table()
        if model and model not in table.endpoints:
            raise NotFound(f"requested model {model!r} is not available: GET /v2/models lists all")
        endpoints = [table.endpoints[model]] if model else list(table.endpoints.values())
        return [(e, number, e.versions[number]) for e in endpoints for number in sorted(e.versions, key=int)]
