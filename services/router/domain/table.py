"""Compile the route table from the desired state and the workers' reports. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from tidegate.kernel.broker.topology import Queue, requests_queue, suspects_queue
from tidegate.kernel.protocol.llm import BAND_WEIGHTS
from tidegate.kernel.protocol.models import (
    Deployment,
    DesiredState,
    Endpoint,
    Format,
    LlmSpec,
    Shadow,
    Target,
    Version,
)
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.reserves import reserve_names, reserve_of, reserved_targets

Table = dict[str, Any]


def ready_counts(reports: list[ReplicaReport]) -> dict[str, int]:
    """Return the number of ready replicas of each Deployment."""
    counts: dict[str, int] = {}
    for report in reports:
        if report.state == "ready":
            counts[report.deployment] = counts.get(report.deployment, 0) + 1
    return counts


def failing(reports: list[ReplicaReport]) -> frozenset[str]:
    """Return the Deployments with a replica that failed to load its model."""
    return frozenset(report.deployment for report in reports if report.state == "failed")


def build_table(
    desired: DesiredState,
    ready: dict[str, int],
    learned: dict[str, Any],
    failed: frozenset[str] = frozenset(),
    condemned: frozenset[str] = frozenset(),
) -> Table:
    """Return the route table, without its revision.

    The table has the weighted Deployments of each Endpoint, and the queue, signature and limits of each
    Deployment. ``ready``: the number of ready replicas by Deployment. ``learned``: the signatures that
    workers have read from Triton, by Deployment. The table uses them for versions without a registered
    signature. ``failed``: the Deployments whose model fails to load. ``condemned``: the ids of rollouts that
    were rolled back, but whose rollback the registry has not stored yet.
    """
    versions = {(v.model, v.number): v for v in desired.versions}
    # A Deployment cannot serve if its version is missing. Then the Deployment is not in the table.
    deployments = {d.name: d for d in desired.deployments if (d.model, d.version) in versions}
    reserves = reserve_names(desired)
    return {
        "endpoints": {
            e.name: _endpoint(e, deployments, ready, failed, condemned, reserves, desired.aliases)
            for e in desired.endpoints
        },
        "deployments": {
            name: _deployment(d, versions[(d.model, d.version)], ready.get(name, 0), learned.get(name))
            for name, d in deployments.items()
        },
    }


def queues(table: Table) -> dict[str, list[Queue]]:
    """Return the queues of each Deployment in a table. A language model has one request queue per band."""
    return {name: _queues(name, entry["format"]) for name, entry in table["deployments"].items()}


def _queues(deployment: str, format: Format) -> list[Queue]:
    shared = requests_queue(deployment)
    bands = [requests_queue(deployment, band) for band in BAND_WEIGHTS] if format == "llm" else [shared]
    return [*bands, suspects_queue(shared)]


def _deployment(deployment: Deployment, version: Version, ready: int, learned: Any) -> dict[str, Any]:
    signature = version.signature.model_dump(exclude_none=True) if version.signature else learned
    if version.signature and learned:
        # If the worker has read ``decoupled`` or ``sequences`` from Triton, that value replaces the
        # registered one.
        if learned.get("decoupled"):
            signature["decoupled"] = True
        if learned.get("sequences"):
            signature["sequences"] = learned["sequences"]
    return {
        "model": deployment.model,
        "version": deployment.version,
        "queue": requests_queue(deployment.name).name,
        "format": version.format,
        "signature": signature,
        "max_queue": deployment.max_queue,
        "upstream": deployment.upstream is not None,
        "retry": deployment.retry,
        "wakeable": deployment.max_replicas > 0 and not _is_paused(deployment),
        "ready": ready,
        **_llm(deployment, version),
    }


def _llm(deployment: Deployment, version: Version) -> dict[str, Any]:
    """Return the facts about a language model for the gateways; empty for other models."""
    if version.format != "llm":
        return {}
    spec = deployment.llm or LlmSpec()
    return {
        "llm": {
            "context": spec.context,
            "adapters": sorted(spec.adapters),
            "affinity_wait_ms": spec.affinity_wait_ms,
            "slots": spec.slots,
            "created": int(version.created_at.timestamp()),
        }
    }


def _is_paused(deployment: Deployment) -> bool:
    """Return True if an operator set the Deployment to 0 replicas, so that its requests are rejected."""
    return deployment.override is not None and deployment.override.replicas == 0


def _endpoint(
    endpoint: Endpoint,
    deployments: dict[str, Deployment],
    ready: dict[str, int],
    failed: frozenset[str],
    condemned: frozenset[str],
    reserves: frozenset[str],
    aliases: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    deployments = {name: d for name, d in deployments.items() if endpoint.may_use(d)}
    reserved = {
        name: reserve
        for name in reserved_targets(endpoint)
        if (reserve := reserve_of(name, endpoint.name)) in deployments
        and _same_version(
            deployments[reserve], deployments.get(name)
        )  # if the version differs, this Deployment is no reserve but only has the name of one
    }
    ready = ready | {name: ready.get(name, 0) + ready.get(own, 0) for name, own in reserved.items()}
    serving = serving_targets(endpoint, ready)
    without = withheld(endpoint, serving, deployments, ready, failed, condemned)
    own = [deployments[t.deployment] for t in serving if t.deployment in deployments]
    models = {d.model for d in own}
    others = [d for d in deployments.values() if d.model in models and d.name not in reserves]
    return {
        "targets": _targets(endpoint, serving, deployments, without, ready),
        "withheld": without,
        "rules": [rule.model_dump() for rule in endpoint.rules if rule.deployment in deployments],
        "sticky": endpoint.sticky.model_dump() if endpoint.sticky else None,
        "shadow": _shadow(endpoint, deployments),
        # Compare the variants of an experiment only while no target is withheld. Otherwise the control also
        # gets the units of other variants, and these would falsify its counts.
        "compared": _canary_of(endpoint) != "" or (_experiment_of(endpoint) != "" and not without),
        "experiment": "" if without else _experiment_of(endpoint),
        "feedback": endpoint.collects_feedback,
        # ``versions`` maps each version to the Deployment for requests that name this version. All
        # Deployments of the Endpoint's models are included. If several of them have the same version, a
        # target of the Endpoint is preferred. Otherwise the Deployment whose name is last in the alphabet is
        # used.
        "versions": {str(d.version): d.name for d in (*sorted(others, key=_name), *sorted(own, key=_name))},
        # Several models of the Endpoint may have the same alias for different versions. Then the model whose
        # name is last in the alphabet decides.
        "labels": {
            alias: str(number) for model in sorted(models) for alias, number in aliases.get(model, {}).items()
        },
        "default_timeout_ms": endpoint.default_timeout_ms,
        "weight": endpoint.weight,
        "reserved": reserved,
        "failover": [name for name in endpoint.failover if name in deployments],
    }


def _same_version(one: Deployment, other: Deployment | None) -> bool:
    return other is not None and (one.model, one.version) == (other.model, other.version)


def _targets(
    endpoint: Endpoint,
    serving: list[Target],
    deployments: dict[str, Deployment],
    without: Mapping[str, str],
    ready: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return the targets that get traffic now, without the withheld ones.

    If targets are withheld and no other target has a weight, add the first failover Deployment that is ready.
    """
    found = [t for t in serving if t.deployment in deployments and t.deployment not in without]
    if without and not any(t.weight for t in found):
        spare = [name for name in endpoint.failover if name in deployments and ready.get(name, 0)]
        found += [Target(deployment=name) for name in spare[:1]]
    return [target.model_dump() for target in found]


def _shadow(endpoint: Endpoint, deployments: dict[str, Deployment]) -> dict[str, Any] | None:
    """Return the shadow's settings for the gateways.

    Return None if there is no shadow, or if the Endpoint cannot use the shadow's Deployment.
    """
    shadow = endpoint.shadow
    if shadow is None or shadow.deployment not in deployments:
        return None
    return {
        "deployment": shadow.deployment,
        "key": shadow_key(shadow),
        "rate": shadow.rate,
        "max_per_s": shadow.max_per_s,
        "atol": shadow.tolerance.atol,
        "rtol": shadow.tolerance.rtol,
        "wake": shadow.wake,
        "until": shadow.until.timestamp() if shadow.until else None,
    }


def shadow_key(shadow: Shadow) -> str:
    """Return the key of a shadow's counts: its id, or a hash of its fields if `tidegate apply` made it."""
    return shadow.id or sha256(shadow.model_dump_json().encode()).hexdigest()[:8]


def _canary_of(endpoint: Endpoint) -> str:
    """Return the Deployment of the active canary; empty without one."""
    rollout = endpoint.rollout
    return rollout.deployment if rollout is not None and rollout.active else ""


def _experiment_of(endpoint: Endpoint) -> str:
    """Return the id of the running experiment; empty without one."""
    experiment = endpoint.experiment
    return experiment.id if experiment is not None and experiment.active else ""


def _treatments_of(endpoint: Endpoint) -> list[str]:
    """Return the treatments of the running experiment; empty without one."""
    experiment = endpoint.experiment
    return experiment.treatments if experiment is not None and experiment.active else []


def withheld(
    endpoint: Endpoint,
    serving: list[Target],
    deployments: dict[str, Deployment],
    ready: dict[str, int],
    failed: frozenset[str],
    condemned: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """Return the targets that get no traffic now, each with the reason.

    If no target and no failover is ready, no target is withheld: requests wait or fail. This rule has two
    exceptions. A canary that was rolled back is always withheld. If ``when_unready`` is ``fail``, a new
    version is withheld until it is ready.
    """
    rollout = endpoint.rollout if endpoint.rollout is not None and endpoint.rollout.active else None
    if rollout is not None and rollout.id in condemned:
        return {rollout.deployment: "the canary was rolled back, but the registry does not answer yet"}
    weighted = [target.deployment for target in serving if target.weight]
    if endpoint.when_unready == "fail":  # here, only a new version that is not ready is withheld
        unready = [name for name in weighted if not ready.get(name, 0)]
        if rollout is not None:
            return {name: "the canary is not ready yet" for name in unready if name == rollout.deployment}
        return {name: "the variant is not ready yet" for name in unready if name in _treatments_of(endpoint)}
    spare = any(ready.get(name, 0) for name in endpoint.failover if name in deployments)
    if not spare and not any(ready.get(name, 0) for name in weighted):
        return {}
    found = {}
    for name in weighted:
        deployment = deployments.get(name)
        if deployment is None or ready.get(name, 0):
            continue
        if _is_paused(deployment):
            found[name] = "the Deployment is paused"
        elif rollout is not None and rollout.deployment == name:
            found[name] = "the canary is not ready yet"
        elif name in failed:
            found[name] = "the model fails to load"
        elif _experiment_of(endpoint):
            found[name] = "the variant is not ready yet"
        elif endpoint.when_unready == "others":
            found[name] = "the Deployment has no ready replica"
    return found


def _name(deployment: Deployment) -> str:
    return deployment.name


def serving_targets(endpoint: Endpoint, ready: dict[str, int]) -> list[Target]:
    """Return the targets that get the traffic now: the new targets or the previous ones.

    The previous targets get it until every new target with a weight is ready. So a version that never loads
    gets no requests.
    """
    if not endpoint.previous or all(ready.get(t.deployment, 0) for t in endpoint.targets if t.weight):
        return endpoint.targets
    return endpoint.previous


def settled(desired: DesiredState, ready: dict[str, int]) -> list[Endpoint]:
    """Return the Endpoints whose new targets with a weight are all ready.

    These Endpoints no longer need ``previous``.
    """
    return [e for e in desired.endpoints if e.previous and serving_targets(e, ready) == e.targets]
