"""Compiles the route table: a pure function of what is wanted and of which workers are there."""

from __future__ import annotations

from typing import Any

from tidegate.kernel.broker.topology import requests_queue
from tidegate.kernel.protocol.models import Deployment, DesiredState, Endpoint, Target, Version
from tidegate.kernel.protocol.presence import ReplicaReport

Table = dict[str, Any]


def ready_counts(reports: list[ReplicaReport]) -> dict[str, int]:
    """How many ready replicas each Deployment has."""
    counts: dict[str, int] = {}
    for report in reports:
        if report.state == "ready":
            counts[report.deployment] = counts.get(report.deployment, 0) + 1
    return counts


def compile_table(desired: DesiredState, ready: dict[str, int], learned: dict[str, Any]) -> Table:
    """The table without its revision: endpoints -> weighted Deployments -> queue, signature, limits.

    ``learned``: signatures that workers read from their Triton, by Deployment, for versions registered
    without one.
    """
    versions = {(v.model, v.number): v for v in desired.versions}
    # A Deployment whose version is not there cannot be served; the table names nothing that it lacks.
    deployments = {d.name: d for d in desired.deployments if (d.model, d.version) in versions}
    return {
        "endpoints": {e.name: _endpoint(e, deployments, ready) for e in desired.endpoints},
        "deployments": {
            name: _deployment(d, versions[(d.model, d.version)], ready.get(name, 0), learned.get(name))
            for name, d in deployments.items()
        },
    }


def _deployment(deployment: Deployment, version: Version, ready: int, learned: Any) -> dict[str, Any]:
    signature = version.signature.model_dump() if version.signature else learned
    if version.signature and learned and learned.get("decoupled"):
        signature["decoupled"] = True  # the model server knows, whatever was registered
    return {
        "model": deployment.model,
        "version": deployment.version,
        "queue": requests_queue(deployment.name).name,
        "format": version.format,
        "signature": signature,
        "max_queue": deployment.max_queue,
        "retry": deployment.retry,
        "wakeable": deployment.max_replicas > 0 and not _held_at_zero(deployment),
        "ready": ready,
    }


def _held_at_zero(deployment: Deployment) -> bool:
    """An operator paused it: its callers are refused at once instead of waiting for their deadlines."""
    return deployment.override is not None and deployment.override.replicas == 0


def _endpoint(
    endpoint: Endpoint, deployments: dict[str, Deployment], ready: dict[str, int]
) -> dict[str, Any]:
    serving = serving_targets(endpoint, ready)
    own = [deployments[t.deployment] for t in serving if t.deployment in deployments]
    models = {d.model for d in own}
    others = [d for d in deployments.values() if d.model in models]
    return {
        "targets": [t.model_dump() for t in serving if t.deployment in deployments],
        # An explicit version reaches any Deployment of the endpoint's models: the endpoint's own if it runs
        # that version (others may be there for a while, to measure), else the newest name.
        "versions": {str(d.version): d.name for d in (*sorted(others, key=_name), *sorted(own, key=_name))},
        "default_timeout_ms": endpoint.default_timeout_ms,
    }


def _name(deployment: Deployment) -> str:
    return deployment.name


def serving_targets(endpoint: Endpoint, ready: dict[str, int]) -> list[Target]:
    """Who takes the traffic now: the targets, once each with weight can answer; before that, ``previous``.

    New targets get nothing before they are ready, so a version that never loads hurts nobody.
    """
    if not endpoint.previous or all(ready.get(t.deployment, 0) for t in endpoint.targets if t.weight):
        return endpoint.targets
    return endpoint.previous


def settled(desired: DesiredState, ready: dict[str, int]) -> list[Endpoint]:
    """Endpoints whose roll-over is complete: their ``previous`` may be forgotten."""
    return [e for e in desired.endpoints if e.previous and serving_targets(e, ready) == e.targets]
