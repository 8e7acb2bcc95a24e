"""Plan the rollback of an Endpoint to the version that it served before. Pure.

The audit log shows which versions have served. A version that never became ready is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.registry.domain import experiments, names, rollouts, rollover
from services.registry.domain.desired_state import (
    Change,
    PutDeployment,
    RegistrySnapshot,
    StoredDeployment,
    StoredEndpoint,
)
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.experiments import Experiment
from tidegate.kernel.protocol.models import DeploymentSpec, Rollout

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EndpointHistory:
    """An Endpoint's past states (newest first) and its deleted Deployments (by name), from the audit log."""

    states: Sequence[Fields] = ()
    deleted: Mapping[str, Fields] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """The plan of a rollback to ``deployment``.

    ``remade``: True if that Deployment was deleted. Then the plan creates it again.
    """

    changes: list[Change]
    deployment: str
    model: str
    version: int
    replaced: list[str]
    remade: bool


@dataclass(frozen=True, slots=True)
class _Choice:
    deployment: str
    model: str
    version: int


def rollback(
    snapshot: RegistrySnapshot,
    name: str,
    version: int | None,
    history: EndpointHistory,
    now: float = 0.0,
) -> RollbackPlan:
    """Plan the rollback of an Endpoint to ``version``; None means an earlier version.

    If ``version`` is None and a change of versions is in progress, plan only this:

    - Abort a roll-over to a newer version.
    - Let a roll-over to an older version continue, because that is itself a rollback.
    - End a canary or an experiment at ``now`` (Unix time in seconds).

    If ``version`` is None and no such change is in progress, choose the older version that had all traffic
    most recently. Raise NotFound if the version is not registered, Conflict if no older version exists.
    """
    endpoint = snapshot.endpoint(name)
    if version is None and endpoint.spec.previous:
        return _abandon_rollout(snapshot, endpoint, now)
    rollout = endpoint.spec.rollout
    if version is None and rollout is not None and rollout.active:
        return _end_canary(snapshot, endpoint, rollout, now)
    experiment = endpoint.spec.experiment
    if version is None and experiment is not None and experiment.active:
        return _end_experiment(snapshot, endpoint, experiment, now)
    choice = (
        _of_request(snapshot, endpoint, version, history)
        if version
        else _before_current(snapshot, endpoint, history)
    )
    remade = choice.deployment not in snapshot.deployments
    changes: list[Change] = []
    if remade and (old := history.deleted.get(choice.deployment)):
        changes = [
            PutDeployment(StoredDeployment(_spec_before_deletion(snapshot, endpoint, old)), created=True)
        ]
    request = rollover.DeployRequest(choice.model, choice.version, {"name": choice.deployment}, endpoint=name)
    changes += rollover.deploy(snapshot.after(changes), request).changes
    serving = [t.deployment for t in endpoint.spec.previous or endpoint.spec.targets]
    replaced = [each for each in serving if each != choice.deployment]
    return RollbackPlan(changes, choice.deployment, choice.model, choice.version, replaced, remade)


def deployments_of(states: Sequence[Fields]) -> list[str]:
    """Return the Deployments that had all traffic of an Endpoint at some time.

    The first in the list is the one that had the traffic most recently.
    """
    return list(dict.fromkeys(name for name in map(_sole_target, states) if name is not None))


def _abandon_rollout(snapshot: RegistrySnapshot, endpoint: StoredEndpoint, now: float) -> RollbackPlan:
    """Plan to abort a roll-over: the Deployments that serve now become the targets.

    If the roll-over is itself a rollback, let it continue.
    """
    target, serving = (snapshot.heaviest(each) for each in (endpoint.spec.targets, endpoint.spec.previous))
    if target.model == serving.model and target.version < serving.version:
        replaced = [each.deployment for each in endpoint.spec.previous]
        return RollbackPlan([], target.name, target.model, target.version, replaced, remade=False)
    spec = endpoint.spec.model_copy(
        update={
            "targets": endpoint.spec.previous,
            "previous": [],
            "rollout": rollouts.withdrawn(endpoint.spec, now),
        }
    )
    changes = rollover.replace_endpoint(snapshot, endpoint.spec, spec)
    kept = {each.deployment for each in spec.targets}
    replaced = [t.deployment for t in endpoint.spec.targets if t.deployment not in kept]
    return RollbackPlan(changes, serving.name, serving.model, serving.version, replaced, remade=False)


def _end_canary(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, rollout: Rollout, now: float
) -> RollbackPlan:
    """Plan to roll a canary back: the baseline gets all traffic immediately."""
    progress = rollouts.Progress("rolled_back", "an operator rolled back")
    changes = rollouts.advance(snapshot, endpoint.spec.name, rollout.id, progress, now)
    base = snapshot.heaviest(rollout.base)
    return RollbackPlan(changes, base.name, base.model, base.version, [rollout.deployment], remade=False)


def _end_experiment(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, experiment: Experiment, now: float
) -> RollbackPlan:
    """Plan to stop an experiment: its control gets all traffic immediately."""
    reason = "an operator rolled back"
    changes = experiments.end(snapshot, endpoint.spec.name, experiment.id, "stopped", reason, now)
    control = snapshot.deployment(experiment.control).spec
    return RollbackPlan(
        changes, control.name, control.model, control.version, experiment.treatments, remade=False
    )


def _before_current(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, history: EndpointHistory
) -> _Choice:
    """Return the older version that had all traffic most recently.

    Older means: it has a lower number than the current version, or it is a version of another model.
    """
    current = snapshot.heaviest(endpoint.spec.targets)
    for choice in _served(snapshot, history):
        if choice.model != current.model or choice.version < current.version:
            return choice
    # The audit log may have no earlier version, for example if the Endpoint is older than the log. Then use
    # the version numbers.
    older = [number for number in snapshot.numbers(current.model) if number < current.version]
    if not older:
        registered = ", ".join(map(str, snapshot.numbers(current.model)))
        raise Conflict(
            f"Endpoint {endpoint.spec.name!r} serves version {current.version} of model {current.model!r}, "
            f"and there is no older version to go back to. Registered versions: {registered}."
        )
    return _of_version(snapshot, current.model, older[-1])


def _of_request(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, version: int | None, history: EndpointHistory
) -> _Choice:
    current = snapshot.heaviest(endpoint.spec.targets)
    for choice in _served(snapshot, history):
        if (choice.model, choice.version) == (current.model, version):
            return choice
    return _of_version(snapshot, current.model, version or current.version)


def _of_version(snapshot: RegistrySnapshot, model: str, version: int) -> _Choice:
    """Return an existing Deployment of a version; if there is none, the one to create.

    If several exist, return the one with the name that `deploy` gives, or else the first by name. The one to
    create also has the name that `deploy` gives.
    """
    default = names.of_deployment(model, version)
    existing = [d.spec.name for d in snapshot.deployments.values() if _runs(d.spec, model, version)]
    return _Choice(default if default in existing or not existing else min(existing), model, version)


def _served(snapshot: RegistrySnapshot, history: EndpointHistory) -> Iterator[_Choice]:
    """Yield the registered versions that had all traffic at some time.

    The first is the version that had the traffic most recently.
    """
    for name in deployments_of(history.states):
        stored = snapshot.deployments.get(name)
        fields: Fields = stored.spec.model_dump() if stored else history.deleted.get(name, {})
        key = (fields.get("model"), fields.get("version"))
        if key in snapshot.versions:
            yield _Choice(name, str(key[0]), int(str(key[1])))


def _sole_target(state: Fields) -> str | None:
    """Return the Deployment that has all traffic; None during a roll-over or a split."""
    weighted = [target["deployment"] for target in state.get("targets", ()) if target.get("weight", 100)]
    return str(weighted[0]) if len(weighted) == 1 and not state.get("previous") else None


def _spec_before_deletion(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, old: Fields
) -> DeploymentSpec:
    """Return the spec that a deleted Deployment had.

    The values of ``env`` are from the Endpoint's current Deployment, because the audit log hides such values.
    """
    known = {key: value for key, value in old.items() if key in DeploymentSpec.model_fields}
    env = snapshot.heaviest(endpoint.spec.targets).env if old.get("env") else {}
    return DeploymentSpec.model_validate({**known, "env": env})


def _runs(spec: DeploymentSpec, model: str, version: int) -> bool:
    return (spec.model, spec.version) == (model, version)
