"""The route table in memory, and the choice of a Deployment. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.gateway.domain.contract import Contract
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.traffic_split import Origin, Sticky, TrafficRule, TrafficSplitter, stay
from tidegate.kernel.broker.topology import Queue, requests_queue
from tidegate.kernel.errors import NoRoutes, NotFound
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.models import Signature

# With this label, a client of TensorFlow Serving lets the endpoint choose the version.
STABLE = "stable"
# The largest number of flows that an endpoint caches. A lookup is quicker than making a new flow.
FLOWS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class LlmRoute:
    """Facts about a language model. ``context``: its context length (prompt and answer) in tokens, if known.

    ``adapters``: names of LoRA adapters. ``slots``: how many requests a replica runs at the same time.
    ``created``: the version's time of creation in seconds since the epoch. ``affinity_wait_ms``: the longest
    wait for the preferred replica; 0 means no preference.
    """

    context: int | None = None
    adapters: tuple[str, ...] = ()
    slots: int = 4
    created: int = 0
    affinity_wait_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class DeploymentRoute:
    """A Deployment in the route table. ``llm``: None except for a language model.

    ``upstream``: True if the Deployment sends requests to another server, which may be unavailable.
    """

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
    upstream: bool = False

    @property
    def decoupled(self) -> bool:
        """Return True if the model may return many answers to one request; False without a signature."""
        return self.contract.signature is not None and self.contract.signature.decoupled

    @property
    def stateful(self) -> bool:
        """Return True if the model keeps a state between the requests of a sequence."""
        return self.contract.signature is not None and self.contract.signature.sequences is not None


@dataclass(frozen=True, slots=True)
class ShadowRoute:
    """The Deployment that gets copies of an endpoint's requests. ``key`` identifies this shadow's counts.

    ``rate``: the percentage of requests to copy. ``max_per_s``: the most copies per second; None means no
    limit. ``until``: when copying ends, in seconds since the epoch. ``wake``: True if copies may start a
    replica.
    """

    deployment: DeploymentRoute
    key: str
    rate: float = 100.0
    max_per_s: float | None = None
    atol: float = 1e-6
    rtol: float = 1e-4
    wake: bool = False
    until: float | None = None


@dataclass(frozen=True, slots=True)
class EndpointRoute:
    """The Deployments of an endpoint. ``targets`` share the traffic in proportion to ``weights``.

    ``rules`` are tried before the weights. A rule may name a Deployment that is not a target. ``sticky``:
    where to find the sticky key, which keeps requests with the same key at one target. ``shadow``: the
    Deployment that gets copies of requests. ``failover``: Deployments without a share of the traffic; they
    get requests that the targets cannot answer. ``reserves``: for some targets, by name, a second Deployment,
    whose replicas serve only this endpoint.

    ``compared``: True if answers, failures and latencies are counted by Deployment, for a canary or an
    experiment. ``feedback``: True if answers get an id, with which callers report outcomes. ``weight``: the
    endpoint's weight at a Deployment that several endpoints share. ``experiment``: the id of the running
    experiment, or empty. ``labels``: the version number of each alias. ``stateful``: True if a Deployment's
    model keeps a state for each sequence.
    """

    name: str
    targets: tuple[DeploymentRoute, ...]
    weights: tuple[int, ...]
    versions: dict[str, DeploymentRoute]
    timeout_ms: int
    rules: tuple[tuple[TrafficRule, DeploymentRoute], ...] = ()
    sticky: Sticky | None = None
    compared: bool = False
    feedback: bool = False
    shadow: ShadowRoute | None = None
    weight: int = 1
    experiment: str = ""
    failover: tuple[DeploymentRoute, ...] = ()
    reserves: Mapping[str, DeploymentRoute] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = field(init=False)
    stateful: bool = field(init=False)
    _flows: dict[str, FlowKey] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(route.name for route in self.targets))
        routes = (*self.targets, *self.versions.values())
        object.__setattr__(self, "stateful", any(route.stateful for route in routes))

    def flow_of(self, caller: Principal) -> FlowKey:
        """Return the flow of a caller's requests, from a cache for speed."""
        weight = self.weight * caller.weight
        flow = self._flows.get(caller.id)
        if flow is None or flow.weight != weight:
            if len(self._flows) >= FLOWS_KEPT:
                self._flows.clear()
            flow = self._flows[caller.id] = FlowKey(self.name, caller.id, weight)
        return flow

    def choose(self, splitter: TrafficSplitter, origin: Callable[[], Origin] | None) -> DeploymentRoute:
        """Return the Deployment for the next request. Raise NotFound if no target gets traffic."""
        targets = self.targets
        if origin is not None and (self.rules or self.sticky is not None):
            found = self._by_origin(origin())
            if found is not None:
                return found
        if len(targets) == 1:
            return targets[0]
        if not targets:
            raise NotFound(
                f"no deployment of model {self.name!r} gets traffic: give one a share with `tidegate split`"
            )
        return targets[splitter.draw(self.name, self.names, self.weights)]

    def labelled(self, label: str) -> str:
        """Return the version of a label. Raise NotFound if the label does not exist.

        Every alias is a label. The label ``stable`` exists even if no alias has this name. In this case,
        return "", so that the endpoint chooses the version.
        """
        if label in self.labels:
            return self.labels[label]
        if label == STABLE:
            return ""
        others = ", ".join(sorted({*self.labels, STABLE}))
        raise NotFound(
            f"{self.name!r} has no label {label[:60]!r}: leave the label out, name a version, or use one of "
            f"{others}"
        )

    def route_named(self, deployment: str) -> DeploymentRoute | None:
        """Return the Deployment with this name; None if requests to this endpoint cannot reach it."""
        routes = (
            *self.targets,
            *self.versions.values(),
            *self.reserves.values(),
            *self.failover,
            *(route for _, route in self.rules),
        )
        return next((route for route in routes if route.name == deployment), None)

    def has_rule_for(self, origin: Origin) -> bool:
        """Return True if a rule chooses the Deployment of a request.

        No other Deployment may run such a request, even if the chosen one fails.
        """
        return any(rule.matches(origin) for rule, _ in self.rules)

    def _by_origin(self, origin: Origin) -> DeploymentRoute | None:
        for rule, route in self.rules:
            if rule.matches(origin):
                return route
        key = self.sticky.key(origin) if self.sticky is not None else None
        if key is None or not self.targets:
            return None
        return self.targets[stay(key, self.names, self.weights)]


@dataclass(frozen=True, slots=True)
class RouteTable:
    """A compiled route table. A newer table has a greater ``revision``."""

    revision: tuple[str, int]
    endpoints: dict[str, EndpointRoute]

    def deployments(self) -> list[str]:
        """Return the names of all Deployments in the table."""
        names = {route.name for e in self.endpoints.values() for route in e.versions.values()}
        names |= {route.name for e in self.endpoints.values() for route in e.targets}
        return sorted(names)

    def pick(
        self,
        endpoint: str,
        version: str,
        splitter: TrafficSplitter,
        origin: Callable[[], Origin] | None = None,
    ) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment for a request. Raise NotFound if either is missing.

        ``origin`` returns the facts that the endpoint's rules and sticky keys read. Without ``origin``, rules
        and sticky keys are skipped. If ``version`` is not empty, it overrides rules, sticky keys and weights.
        """
        route = self.endpoints.get(endpoint)
        if route is not None and not version:
            return route, route.choose(splitter, origin)
        return self.find(endpoint, version)

    def find(self, endpoint: str, version: str) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment of a version, without a random choice.

        If ``version`` is empty, return the Deployment with the largest share of the traffic. Raise NotFound
        if the endpoint or the Deployment does not exist.
        """
        route = self.endpoints.get(endpoint)
        if route is None:
            raise unknown_model(endpoint)
        if not version:
            if not route.targets:
                return route, route.choose(TrafficSplitter(), None)  # raises NotFound with the reason
            largest = max(range(len(route.targets)), key=lambda index: route.weights[index])
            return route, route.targets[largest]
        deployment = route.versions.get(version) or route.versions.get(route.labels.get(version, ""))
        if deployment is None:
            raise NotFound(_no_version(route, version))
        return route, deployment


def _no_version(route: EndpointRoute, version: str) -> str:
    number = route.labels.get(version)
    if number is not None:
        return (
            f"{version!r} of model {route.name!r} is version {number}, which has no deployment: start it "
            f"with `tidegate deploy MODEL --version {version}`"
        )
    labels = f", and the aliases {sorted(route.labels)}" if route.labels else ""
    if not version.isdecimal():
        return (  # the message begins with Triton's words
            f"failed to get model version from specified version string {version!r}: model {route.name!r} "
            f"has the versions {sorted(route.versions)}{labels}"
        )
    return (
        f"Request for unknown model: {route.name!r} version {version} is not found; it has "
        f"{sorted(route.versions)}{labels}"
    )


def unknown_model(name: str) -> NotFound:
    """Return the error for a model that does not exist. The message begins with Triton's words."""
    return NotFound(f"Request for unknown model: {name!r} is not found: GET /v2/models lists all")


def require(table: RouteTable | None) -> RouteTable:
    """Return the route table; raise NoRoutes if there is none yet.

    NotFound would be wrong, because the requested model may exist.
    """
    if table is None:
        raise NoRoutes(
            "this gateway has no route table yet: the router has not published one (see `tidegate status`)",
            retry_after_s=1.0,
        )
    return table


def parse_table(raw: dict[str, Any]) -> RouteTable:
    """Compile the route table that the router publishes.

    Raise KeyError, TypeError or ValueError if the table is malformed.
    """
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
        contract=Contract(signature, entry["model"]),
        max_queue=entry["max_queue"],
        retry_safe=entry["retry"] == "safe",
        wakeable=entry["wakeable"],
        ready=entry["ready"],
        llm=_llm(entry),
        upstream=bool(entry.get("upstream")),
    )


def _llm(entry: dict[str, Any]) -> LlmRoute | None:
    if entry["format"] != "llm":
        return None
    found = entry.get("llm") or {}
    return LlmRoute(**{**found, "adapters": tuple(found.get("adapters", ()))})


def _endpoint(name: str, entry: dict[str, Any], deployments: dict[str, DeploymentRoute]) -> EndpointRoute:
    weighted = [(t["weight"], deployments[t["deployment"]]) for t in entry["targets"] if t["weight"] > 0]
    versions = {number: deployments[deployment] for number, deployment in entry["versions"].items()}
    rules = [
        (_rule(rule), deployments[rule["deployment"]])
        for rule in entry.get("rules", ())
        if rule["deployment"] in deployments
    ]
    sticky = entry.get("sticky")
    return EndpointRoute(
        name,
        tuple(route for _, route in weighted),
        tuple(weight for weight, _ in weighted),
        versions,
        entry["default_timeout_ms"],
        tuple(rules),
        Sticky(sticky["by"], sticky.get("name") or "") if sticky else None,
        bool(entry.get("compared")),
        bool(entry.get("feedback")),
        _shadow(entry.get("shadow"), deployments),
        entry.get("weight", 1),
        str(entry.get("experiment") or ""),
        tuple(deployments[each] for each in entry.get("failover", ()) if each in deployments),
        {name: deployments[own] for name, own in entry.get("reserved", {}).items() if own in deployments},
        entry.get("labels", {}),
    )


def _shadow(raw: dict[str, Any] | None, deployments: dict[str, DeploymentRoute]) -> ShadowRoute | None:
    if raw is None or raw["deployment"] not in deployments:
        return None
    known = {name: raw[name] for name in ShadowRoute.__dataclass_fields__ if name in raw}
    return ShadowRoute(**{**known, "deployment": deployments[raw["deployment"]]})


def _rule(raw: dict[str, Any]) -> TrafficRule:
    header, value = raw.get("header"), raw.get("value")
    return TrafficRule(
        header.lower().encode("latin-1") if header else None,
        value.encode() if value is not None else None,
        raw.get("tenant"),
    )
