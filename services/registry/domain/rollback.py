"""Going back to the version that an endpoint served before.

What served when is read from the audit log: a version that was deployed and never became ready is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.registry.domain import names, rollover
from services.registry.domain.desired_state import (
    Change,
    PutDeployment,
    RegistrySnapshot,
    StoredDeployment,
    StoredEndpoint,
)
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, Target

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EndpointHistory:
    """From the audit log: states of an Endpoint, newest first, and Deployments that were deleted."""

    states: Sequence[Fields] = ()
    deleted: Mapping[str, Fields] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """The plan of a rollback. ``remade``: the Deployment had been deleted, or there never was one."""

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
    snapshot: RegistrySnapshot, name: str, version: int | None, history: EndpointHistory
) -> RollbackPlan:
    """Return how the Endpoint goes back to ``version``; None: to the last one that served before this one.

    A roll-out that is under way is given up. A rollback that is under way goes on. Raise NotFound if the
    version is not registered, Conflict if there is nothing to go back to.
    """
    endpoint = snapshot.endpoint(name)
    if version is None and endpoint.spec.previous:
        return _turn_back(snapshot, endpoint)
    choice = (
        _stated(snapshot, endpoint, version, history) if version else _before(snapshot, endpoint, history)
    )
    remade = choice.deployment not in snapshot.deployments
    changes: list[Change] = []
    if remade and (old := history.deleted.get(choice.deployment)):
        changes = [PutDeployment(StoredDeployment(_as_it_was(snapshot, endpoint, old)), created=True)]
    order = rollover.DeployRequest(choice.model, choice.version, {"name": choice.deployment}, endpoint=name)
    changes += rollover.deploy(snapshot.after(changes), order).changes
    serving = [t.deployment for t in endpoint.spec.previous or endpoint.spec.targets]
    replaced = [each for each in serving if each != choice.deployment]
    return RollbackPlan(changes, choice.deployment, choice.model, choice.version, replaced, remade)


def deployments_of(states: Sequence[Fields]) -> list[str]:
    """Return the Deployments that had all traffic of an Endpoint at some time, newest first."""
    return list(dict.fromkeys(name for name in map(_sole, states) if name is not None))


def _turn_back(snapshot: RegistrySnapshot, endpoint: StoredEndpoint) -> RollbackPlan:
    """Give up a roll-out: what serves until the targets are ready goes on. A rollback is left alone."""
    going, serving = (_heaviest(snapshot, each) for each in (endpoint.spec.targets, endpoint.spec.previous))
    if going.model == serving.model and going.version < serving.version:
        replaced = [target.deployment for target in endpoint.spec.previous]
        return RollbackPlan([], going.name, going.model, going.version, replaced, remade=False)
    wanted = endpoint.spec.model_copy(update={"targets": endpoint.spec.previous, "previous": []})
    changes = rollover.with_retired(snapshot, endpoint.spec, wanted)
    kept = {target.deployment for target in wanted.targets}
    replaced = [t.deployment for t in endpoint.spec.targets if t.deployment not in kept]
    return RollbackPlan(changes, serving.name, serving.model, serving.version, replaced, remade=False)


def _before(snapshot: RegistrySnapshot, endpoint: StoredEndpoint, history: EndpointHistory) -> _Choice:
    """Return the last version that had all traffic, of those older than what serves now."""
    now = _heaviest(snapshot, endpoint.spec.targets)
    for found in _served(snapshot, history):
        if found.model != now.model or found.version < now.version:
            return found
    # The log may begin later than the endpoint: then the number says what is older.
    older = [number for number in snapshot.numbers(now.model) if number < now.version]
    if not older:
        there = ", ".join(map(str, snapshot.numbers(now.model)))
        raise Conflict(
            f"Endpoint {endpoint.spec.name!r} serves version {now.version} of model {now.model!r}, and there "
            f"is no older one to go back to; registered: {there}."
        )
    return _of_version(snapshot, now.model, older[-1])


def _stated(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint, version: int | None, history: EndpointHistory
) -> _Choice:
    now = _heaviest(snapshot, endpoint.spec.targets)
    for found in _served(snapshot, history):
        if (found.model, found.version) == (now.model, version):
            return found
    return _of_version(snapshot, now.model, version or now.version)


def _of_version(snapshot: RegistrySnapshot, model: str, version: int) -> _Choice:
    """Return the Deployment of a version: the one that `deploy` makes, else any that is there."""
    usual = names.of_deployment(model, version)
    those = [d.spec.name for d in snapshot.deployments.values() if _runs(d.spec, model, version)]
    return _Choice(usual if usual in those or not those else min(those), model, version)


def _served(snapshot: RegistrySnapshot, history: EndpointHistory) -> Iterator[_Choice]:
    for name in deployments_of(history.states):
        held = snapshot.deployments.get(name)
        fields: Fields = held.spec.model_dump() if held else history.deleted.get(name, {})
        key = (fields.get("model"), fields.get("version"))
        if key in snapshot.versions:
            yield _Choice(name, str(key[0]), int(str(key[1])))


def _sole(state: Fields) -> str | None:
    """Return the Deployment that has all traffic; None while a roll-out goes on, or if they are several."""
    weighted = [target["deployment"] for target in state.get("targets", ()) if target.get("weight", 100)]
    return str(weighted[0]) if len(weighted) == 1 and not state.get("previous") else None


def _as_it_was(snapshot: RegistrySnapshot, endpoint: StoredEndpoint, old: Fields) -> DeploymentSpec:
    """Return a deleted Deployment's spec. The log hides the values of ``env``, so today's are taken over."""
    known = {key: value for key, value in old.items() if key in DeploymentSpec.model_fields}
    env = _heaviest(snapshot, endpoint.spec.targets).env if old.get("env") else {}
    return DeploymentSpec.model_validate({**known, "env": env})


def _heaviest(snapshot: RegistrySnapshot, targets: Sequence[Target]) -> DeploymentSpec:
    target = max(targets, key=lambda each: each.weight)
    return snapshot.deployments[target.deployment].spec


def _runs(spec: DeploymentSpec, model: str, version: int) -> bool:
    return (spec.model, spec.version) == (model, version)
