"""Check if models may be loaded and unloaded, and find the Deployments of an endpoint. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from tidegate.kernel.errors import BadRequest, Conflict

# The callers that may load and unload models. With "operate", callers with the scope ``operate`` may do it.
# With "infer", all callers that may send requests may do it. With "off", no caller may do it.
Allowed = Literal["operate", "infer", "off"]

# Triton returns this message if its model control mode is not "explicit".
NOT_ALLOWED = "explicit model load / unload is not allowed if polling is enabled"


def check_parameters(model: str, parameters: Mapping[str, Any]) -> None:
    """Raise BadRequest if a load request contains a configuration or files.

    A configuration or files would change the version, and a version never changes.
    """
    if any(name.startswith("file:") for name in parameters):
        what = "files"
    elif "config" in parameters:
        what = "a configuration"
    else:
        return
    raise BadRequest(
        f"failed to load {model!r}, a load cannot include {what}, because a version never changes. Change "
        f"the model's directory, and deploy it as a new version with `tidegate deploy FOLDER --name {model}`"
    )


def deployments_of(endpoint: EndpointRoute) -> list[DeploymentRoute]:
    """Return every Deployment that answers requests to an endpoint, without duplicates."""
    routes = [*endpoint.targets, *endpoint.versions.values(), *endpoint.failover]
    return list({route.name: route for route in routes}.values())


def targets_of(endpoint: EndpointRoute) -> list[DeploymentRoute]:
    """Return the Deployments that must be ready before an endpoint counts as loaded."""
    return list(endpoint.targets) or deployments_of(endpoint)


def check_unshared(endpoint: EndpointRoute, others: Iterable[EndpointRoute]) -> None:
    """Raise Conflict if unloading an endpoint would stop a Deployment that another endpoint shares."""
    mine = {route.name for route in deployments_of(endpoint)}
    for other in others:
        shared = {route.name for route in deployments_of(other)} & mine
        if other.name != endpoint.name and shared:
            name = min(shared)
            raise Conflict(
                f"failed to unload {endpoint.name!r}, because the Deployment {name} also serves "
                f"{other.name!r}. Stop the Deployment for both endpoints with `tidegate pause {name}`"
            )
