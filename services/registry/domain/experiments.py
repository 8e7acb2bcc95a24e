"""Plan the start and the end of an experiment. Pure.

The registry stores the state of an experiment. The router counts the outcomes. During an experiment, the
Endpoint's targets and sticky keys do not change, because a unit must stay at its variant.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from services.registry.domain import names, rollover, waking
from services.registry.domain.desired_state import Change, PutEndpoint, RegistrySnapshot
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.experiments import (
    Experiment,
    ExperimentEvent,
    ExperimentOptions,
    ExperimentPhase,
)
from tidegate.kernel.protocol.models import EndpointSpec, Target

# All weights of an experiment are multiplied by this factor, as in a rollout. The factor does not change the
# shares.
_SCALE = 1000
_EVENTS_KEPT = 50


def start(
    snapshot: RegistrySnapshot,
    name: str,
    treatments: Sequence[str],
    options: ExperimentOptions,
    id: str,
    now: float,
) -> list[Change]:
    """Plan the start of an experiment.

    The treatments together get ``options.share`` percent of the traffic, in equal shares.

    Raise NotFound if a treatment is not an existing Deployment. Raise BadRequest if a treatment is named
    twice or is the control. Raise Conflict in these cases:

    - A canary or an experiment is in progress.
    - The Endpoint's previous targets still serve, because the new target is not ready.
    - Several Deployments share the traffic, so there is no single control.
    """
    spec = snapshot.endpoint(name).spec
    for each in treatments:
        if each not in snapshot.deployments:
            raise names.unknown("Deployment", each)
    refuse_if_running(spec)
    if spec.previous:
        raise Conflict(
            f"Endpoint {name!r} is rolling over to {spec.targets[0].deployment}. Wait until the roll-over "
            "has ended."
        )
    base = [target.deployment for target in spec.targets if target.weight]
    if len(base) > 1:
        raise Conflict(
            f"An experiment compares with one control, but {len(base)} Deployments share the traffic of "
            f"Endpoint {name!r}: {', '.join(base)}. Choose one first: `tidegate split {name} v1=1`."
        )
    if base[0] in treatments or len(set(treatments)) < len(treatments):
        raise BadRequest(
            f"{base[0]} has the traffic of Endpoint {name!r} now, so it is the control. Name each treatment "
            "only once, and do not name the control."
        )
    experiment = _noted(
        Experiment(
            treatments=list(treatments),
            control=base[0],
            options=options,
            id=id,
            since=now,
            reason="the experiment starts",
            sticky_before=spec.sticky,
        ),
        now,
    )
    changed = _changed(
        spec,
        {
            "experiment": experiment,
            "targets": targets_of(experiment),
            "sticky": spec.sticky or options.sticky,
        },
    )
    return [*waking.wake(snapshot, name, treatments), PutEndpoint(changed, created=False)]


def end(
    snapshot: RegistrySnapshot,
    name: str,
    id: str | None,
    phase: ExperimentPhase,
    reason: str,
    now: float,
) -> list[Change]:
    """Plan the end of an experiment: the control gets all traffic. A repeated call changes nothing.

    Raise NotFound if the Endpoint has no experiment, Conflict if its experiment has another ``id``.
    """
    spec = snapshot.endpoint(name).spec
    experiment = _of(spec, id)
    if not experiment.active:
        if experiment.phase == phase:
            return []
        raise Conflict(f"The experiment of Endpoint {name!r} has ended already: {experiment.phase}.")
    ended = _ended(experiment, phase, reason, now)
    changed = spec.model_copy(
        update={
            "experiment": ended,
            "targets": [Target(deployment=experiment.control)],
            "sticky": experiment.sticky_before,
        }
    )
    return rollover.replace_endpoint(snapshot, spec, changed)


def choose(snapshot: RegistrySnapshot, name: str, winner: str, now: float) -> list[Change]:
    """Plan to send all traffic to a variant. This ends the experiment, if it has not ended before.

    Raise NotFound if the Endpoint has no experiment, BadRequest if the Deployment is not a variant of it.
    """
    spec = snapshot.endpoint(name).spec
    experiment = _of(spec, None)
    if winner not in experiment.variants:
        raise BadRequest(
            f"{winner} is not a variant of the experiment of Endpoint {name!r}. Choose one of "
            f"{', '.join(experiment.variants)}."
        )
    if winner not in snapshot.deployments:
        raise names.unknown("Deployment", winner)
    if experiment.phase == "decided" and experiment.winner == winner:
        return []
    if not experiment.active:
        refuse_if_running(spec)
    decided = _ended(experiment, "decided", f"an operator chose {winner}", now)
    changed = _changed(
        spec,
        {
            "experiment": decided.model_copy(update={"winner": winner}),
            "targets": [Target(deployment=winner)],
            "sticky": experiment.sticky_before if experiment.active else spec.sticky,
        },
    )
    if experiment.active:  # the winner has traffic already, so it is ready
        return rollover.replace_endpoint(snapshot, spec, changed)
    woken = waking.wake(snapshot, name, [winner])
    changed = rollover.with_previous(spec, changed)
    return [*woken, *rollover.replace_endpoint(snapshot.after(woken), spec, changed)]


def refuse_if_running(spec: EndpointSpec) -> None:
    """Raise Conflict if an Endpoint has a running canary or experiment.

    While one of them runs, no other canary or experiment can start at the same Endpoint.
    """
    name = spec.name
    if spec.rollout is not None and spec.rollout.active:
        raise Conflict(
            f"Endpoint {name!r} has a rollout of {spec.rollout.deployment} already ({spec.rollout.phase}). "
            f"End the rollout first: `tidegate promote {name}` or `tidegate rollback {name}`."
        )
    if spec.experiment is not None and spec.experiment.active:
        raise Conflict(
            f"Endpoint {name!r} has a running experiment with {', '.join(spec.experiment.treatments)}. "
            f"End the experiment first: `tidegate experiment {name} --stop` or `--winner VERSION`."
        )


def targets_of(experiment: Experiment) -> list[Target]:
    """Return the targets of a running experiment. Their weights are in exact proportion to the shares."""
    share, number = experiment.options.share, len(experiment.treatments)
    return [
        Target(deployment=experiment.control, weight=(100 - share) * _SCALE * number),
        *(Target(deployment=each, weight=share * _SCALE) for each in experiment.treatments),
    ]


def ended_by_hand(spec: EndpointSpec, reason: str) -> dict[str, Any]:
    """Return the fields of an Endpoint that change when an operator sets its targets.

    A running experiment is aborted. Then the Endpoint gets back the sticky keys that it had before the
    experiment.
    """
    experiment = spec.experiment
    if experiment is None or not experiment.active:
        return {"experiment": experiment}
    return {"experiment": _aborted(experiment, reason), "sticky": experiment.sticky_before}


def kept(stored: EndpointSpec, spec: EndpointSpec, fields: Mapping[str, Any]) -> EndpointSpec:
    """Return ``spec`` with the stored experiment added, unless ``spec`` states another experiment.

    A file for `tidegate apply` has no experiment id. If its treatments and options are those of the stored
    experiment, the file means that experiment.

    A running experiment continues in two cases: the targets in ``spec`` are the stored targets, or the
    control is the only target. With any other targets, the running experiment is aborted.

    Raise Conflict if ``spec`` removes or replaces a running experiment. Also raise Conflict if the experiment
    continues and ``spec`` changes the Endpoint's sticky keys.
    """
    running = stored.experiment
    if running is None:
        return spec
    given = spec.experiment
    same = given is not None and not given.id and _statement(given) == _statement(running)
    stays = same or "experiment" not in fields
    if stays and running.active and spec.targets == [Target(deployment=running.control)]:
        restored = spec.sticky in (None, running.sticky_before)
        sticky = stored.sticky if restored else spec.sticky
        spec = spec.model_copy(update={"targets": stored.targets, "sticky": sticky})
    if stays:
        spec = spec.model_copy(update={"experiment": running})
    kept = spec.experiment
    if not running.active or (kept is not None and kept.id == running.id and not kept.active):
        return spec
    if kept is None or kept.id != running.id or spec.targets == stored.targets:
        _refuse_change(stored, spec)
        return spec
    update = {"experiment": _aborted(running, "an operator set the targets")}
    return spec.model_copy(update=update)


def _refuse_change(stored: EndpointSpec, spec: EndpointSpec) -> None:
    """Raise Conflict if a spec removes or replaces the running experiment, or changes the sticky keys."""
    assert stored.experiment is not None
    replaced = spec.experiment is None or spec.experiment.id != stored.experiment.id
    if replaced or spec.sticky != stored.sticky:
        what = "The running experiment" if replaced else "The sticky keys of the running experiment"
        raise Conflict(
            f"{what} of Endpoint {spec.name!r} cannot be changed. End the experiment first: "
            f"`tidegate experiment {spec.name} --stop`."
        )


def begun(snapshot: RegistrySnapshot, changes: list[Change], spec: EndpointSpec, now: float) -> list[Change]:
    """Return ``changes``, plus the start of the experiment in ``spec`` if that experiment has no id yet.

    ``changes`` must contain the change that writes ``spec``.
    """
    wanted = spec.experiment
    if wanted is None or wanted.id:
        return changes
    put = spec.model_copy(update={"experiment": None})
    changes = [PutEndpoint(put, each.created) if _puts(each, spec) else each for each in changes]
    id_ = hashlib.blake2b(f"{spec.name} {now}".encode(), digest_size=4).hexdigest()
    after = snapshot.after(changes)
    return changes + start(after, spec.name, wanted.treatments, wanted.options, id_, now)


def _puts(change: Change, spec: EndpointSpec) -> TypeGuard[PutEndpoint]:
    return isinstance(change, PutEndpoint) and change.spec.name == spec.name


def _statement(experiment: Experiment) -> tuple[list[str], ExperimentOptions]:
    return experiment.treatments, experiment.options


def _aborted(experiment: Experiment, reason: str) -> Experiment:
    return experiment.model_copy(update={"phase": "aborted", "reason": reason})


def _changed(spec: EndpointSpec, update: Mapping[str, Any]) -> EndpointSpec:
    """Return a spec with these fields changed. End a shadow if its Deployment gets traffic."""
    return rollover.without_own_shadow(spec.model_copy(update=update))


def _of(spec: EndpointSpec, id: str | None) -> Experiment:
    if spec.experiment is None:
        raise NotFound(
            f"Endpoint {spec.name!r} has no experiment. "
            f"Start one: `tidegate rollout {spec.name} --to VERSION --ab`."
        )
    if id is not None and spec.experiment.id != id:
        raise Conflict(
            f"Endpoint {spec.name!r} has another experiment now: `tidegate experiment {spec.name}` shows it."
        )
    return spec.experiment


def _ended(experiment: Experiment, phase: ExperimentPhase, reason: str, now: float) -> Experiment:
    ended = experiment.ended if experiment.ended is not None else now
    changed = experiment.model_copy(update={"phase": phase, "reason": reason, "ended": ended})
    return _noted(changed, now)


def _noted(experiment: Experiment, now: float) -> Experiment:
    event = ExperimentEvent(at=now, phase=experiment.phase, reason=experiment.reason)
    return experiment.model_copy(update={"history": [*experiment.history, event][-_EVENTS_KEPT:]})
