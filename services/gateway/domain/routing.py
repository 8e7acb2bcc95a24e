"""The route table in memory, and the choice of a Deployment: a pure function of table, name and draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.gateway.domain.contract import Contract
from tidegate.kernel.broker.topology import Queue, requests_queue
from tidegate.kernel.errors import NoRoutes, NotFound
from tidegate.kernel.protocol.models import Signature


@dataclass(frozen=True, slots=True)
class LlmRoute:
    """Facts about a language model. ``context``: the most tokens of a prompt and its answer, if known.

    ``adapters``: names of LoRA adapters. ``slots``: the sequences that a replica works on together.
    ``created``: the time of the version in seconds since the epoch.
    """

    context: int | None = None
    adapters: tuple[str, ...] = ()
    slots: int = 4
    created: int = 0


@dataclass(frozen=True, slots=True)
class DeploymentRoute:
    """A Deployment in the route table. ``llm``: only for a language model."""

    name: str
    model: str
    version: str
    format: str
    queue: Queue
    contract: Contract
    max_queue: int
    retry_safe: bool
    wakeable: bool
    ready: int
    llm: LlmRoute | None = None

    @property
    def decoupled(self) -> bool:
        """Return True if the model may return many answers to one request; False without a signature."""
        return self.contract.signature is not None and self.contract.signature.decoupled


@dataclass(frozen=True, slots=True)
class EndpointRoute:
    """The Deployments of an endpoint. ``targets``: pairs of a cumulative traffic share and a Deployment."""

    name: str
    targets: tuple[tuple[float, DeploymentRoute], ...]
    versions: dict[str, DeploymentRoute]
    timeout_ms: int


@dataclass(frozen=True, slots=True)
class RouteTable:
    """A compiled route table. The table with the greater ``revision`` is newer."""

    revision: tuple[str, int]
    endpoints: dict[str, EndpointRoute]

    def deployments(self) -> list[str]:
        """Return the names of all Deployments in the table."""
        names = {route.name for e in self.endpoints.values() for route in e.versions.values()}
        names |= {route.name for e in self.endpoints.values() for _, route in e.targets}
        return sorted(names)

    def pick(self, endpoint: str, version: str, draw: float) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment for a request; raise NotFound.

        ``draw``, in [0, 1), chooses between weighted targets.
        """
        route = self.endpoints.get(endpoint)
        if route is None:
            raise NotFound(f"there is no model {endpoint!r}: GET /v2/models lists all")
        if version:
            deployment = route.versions.get(version)
            if deployment is None:
                raise NotFound(
                    f"model {endpoint!r} has no version {version!r}; it has {sorted(route.versions)}"
                )
            return route, deployment
        for share, deployment in route.targets:
            if draw < share:
                return route, deployment
        raise NotFound(
            f"model {endpoint!r} has no deployment that takes traffic: set its share with `tidegate split`"
        )


def require(table: RouteTable | None) -> RouteTable:
    """Return the table. Without one, raise NoRoutes and not NotFound, because the model may exist."""
    if table is None:
        raise NoRoutes(
            "this gateway has no route table yet: the router has not published one (see `tidegate status`)",
            retry_after_s=1.0,
        )
    return table


def parse_table(raw: dict[str, Any]) -> RouteTable:
    """Compile the route table that the router publishes; raise KeyError, TypeError or ValueError."""
    deployments = {name: _deployment(name, entry) for name, entry in raw["deployments"].items()}
    endpoints = {name: _endpoint(name, entry, deployments) for name, entry in raw["endpoints"].items()}
    return RouteTable((raw["epoch"], raw["n"]), endpoints)


def _deployment(name: str, entry: dict[str, Any]) -> DeploymentRoute:
    signature = Signature.model_validate(entry["signature"]) if entry["signature"] else None
    return DeploymentRoute(
        name=name,
        model=entry["model"],
        version=str(entry["version"]),
        format=entry["format"],
        queue=requests_queue(name),
        contract=Contract(signature),
        max_queue=entry["max_queue"],
        retry_safe=entry["retry"] == "safe",
        wakeable=entry["wakeable"],
        ready=entry["ready"],
        llm=_llm(entry),
    )


def _llm(entry: dict[str, Any]) -> LlmRoute | None:
    if entry["format"] != "llm":
        return None
    found = entry.get("llm") or {}
    return LlmRoute(**{**found, "adapters": tuple(found.get("adapters", ()))})


def _endpoint(name: str, entry: dict[str, Any], deployments: dict[str, DeploymentRoute]) -> EndpointRoute:
    weighted = [(t["weight"], deployments[t["deployment"]]) for t in entry["targets"] if t["weight"] > 0]
    total = sum(weight for weight, _ in weighted)
    shares, running = [], 0
    for weight, deployment in weighted:
        running += weight
        shares.append((running / total, deployment))
    versions = {number: deployments[deployment] for number, deployment in entry["versions"].items()}
    return EndpointRoute(name, tuple(shares), versions, entry["default_timeout_ms"])
