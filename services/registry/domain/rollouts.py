"""Plan the start, the steps and the end of a canary. Pure.

The registry stores the state of a rollout. The router judges the canary. During a rollout, the replicas of
the baseline do not change. So a rollback needs one write and no cold start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.registry.domain import experiments, names, rollover, waking
from services.registry.domain.desired_state import Change, PutEndpoint, RegistrySnapshot
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import (
    CanaryOptions,
    EndpointSpec,
    Rollout,
    RolloutEvent,
    RolloutPhase,
    Target,
)

# All weights are multiplied by this factor, so that rounding hardly changes the shares of several targets.
_SCALE = 1000
_EVENTS_KEPT = 50


@dataclass(frozen=True, slots=True)
class Progress:
    """A decision of the router or an operator about a canary.

    ``step``: the new step; None: the step stays the same.
    """

    phase: RolloutPhase
    reason: str
    step: int | None = None


def start(
    snapshot: RegistrySnapshot, name: str, deployment: str, options: CanaryOptions, id: str, now: float
) -> list[Change]:
    """Plan to make an existing Deployment the canary of an Endpoint, with the first step's share.

    ``now``: Unix time in seconds. Raise NotFound for an unknown Endpoint or Deployment. Raise Conflict while
    another rollout, a roll-over or an experiment is in progress. Raise BadRequest if the Deployment has
    traffic already, or if the first step is 100 %.
    """
    if options.steps[0] >= 100:
        raise BadRequest(
            "The first step is 100 %, so the canary cannot be compared with the present version. Begin with "
            "a smaller share, or replace the version without a canary: "
            f"`tidegate rollout {name} --to {deployment} --swap`."
        )
    spec, base = _checked(snapshot, name, deployment)
    woken = waking.wake(snapshot, name, [deployment])
    snapshot = snapshot.after(woken)
    rollout = Rollout(
        deployment=deployment,
        base=base,
        options=options,
        id=id,
        since=now,
        reason="the canary starts",
        min_replicas=_minimum(snapshot, deployment, options),
    )
    rollout = _noted(rollout, now)
    changed = rollover.without_own_shadow(
        spec.model_copy(update={"rollout": rollout, "targets": targets_of(rollout)})
    )
    scaled = rollover.with_minimum(snapshot, rollout, share_of(rollout))
    return [*woken, *scaled, PutEndpoint(changed, created=False)]


def swap(snapshot: RegistrySnapshot, name: str, deployment: str, id: str, now: float) -> list[Change]:
    """Plan to replace an Endpoint's targets with a Deployment immediately, before it is ready.

    The current targets go to sleep, so the host need not have memory for both versions at the same time.
    Requests wait in the queue of the new Deployment. Raise the errors of :func:`start`, except the error for
    the first step.
    """
    spec, base = _checked(snapshot, name, deployment)
    woken = waking.wake(snapshot, name, [deployment])
    rollout = Rollout(
        deployment=deployment,
        base=base,
        options=CanaryOptions(steps=[100]),
        id=id,
        since=now,
        phase="promoted",
        reason="an operator swapped the version without a canary",
    )
    rollout = _noted(rollout, now)
    update = {"rollout": rollout, "targets": targets_of(rollout), "previous": []}
    changed = spec.model_copy(update=update)
    return [*woken, *rollover.replace_endpoint(snapshot.after(woken), spec, changed)]


def _checked(snapshot: RegistrySnapshot, name: str, deployment: str) -> tuple[EndpointSpec, list[Target]]:
    """Return an Endpoint's spec, and its targets with a weight above 0.

    Raise the errors of :func:`swap`.
    """
    spec = snapshot.endpoint(name).spec
    if deployment not in snapshot.deployments:
        raise names.unknown("Deployment", deployment)
    experiments.refuse_if_running(spec)
    if spec.previous:
        raise Conflict(
            f"Endpoint {name!r} is rolling over to {spec.targets[0].deployment}. Wait until the roll-over "
            "has ended."
        )
    base = [target for target in spec.targets if target.weight]
    if deployment in {target.deployment for target in base}:
        raise BadRequest(f"{deployment} gets traffic of Endpoint {name!r} already, so it cannot be a canary.")
    return spec, base


def _minimum(snapshot: RegistrySnapshot, deployment: str, options: CanaryOptions) -> int | None:
    """Return a canary's minimum number of replicas if the rollout may change it, else None."""
    stored = snapshot.deployment(deployment)
    if stored.declared or options.full_capacity or stored.spec.min_replicas <= 1:
        return None
    return stored.spec.min_replicas


def advance(
    snapshot: RegistrySnapshot, name: str, id: str | None, progress: Progress, now: float
) -> list[Change]:
    """Return the changes for a decision about an Endpoint's rollout. A repeated decision changes nothing.

    Raise NotFound if the Endpoint has no rollout, Conflict if the rollout has ended or has another ``id``.
    """
    spec = snapshot.endpoint(name).spec
    rollout = spec.rollout
    if rollout is None:
        raise NotFound(
            f"Endpoint {name!r} has no rollout. Start one: `tidegate rollout {name} --to VERSION`."
        )
    if id is not None and rollout.id != id:
        raise Conflict(f"Endpoint {name!r} has another rollout now: `tidegate rollout {name}` shows it.")
    step = rollout.step if progress.step is None else progress.step
    if (rollout.phase, rollout.step, rollout.reason) == (progress.phase, step, progress.reason):
        return []
    if not rollout.active:
        raise Conflict(f"The rollout of Endpoint {name!r} has ended: {rollout.phase}.")
    if not 0 <= step < len(rollout.options.steps):
        raise BadRequest(f"The rollout has {len(rollout.options.steps)} steps, so there is no step {step}.")
    moved = step != rollout.step or progress.phase != rollout.phase
    resumed = rollout.phase == "paused" and progress.phase == "running"
    rollout = rollout.model_copy(
        update={
            "phase": progress.phase,
            "step": step,
            "reason": progress.reason,
            "since": now if step != rollout.step or resumed else rollout.since,
        }
    )
    if moved:
        rollout = _noted(rollout, now)
    # After a promotion, the baseline serves as ``previous`` until the canary is ready. Then the router
    # removes ``previous``. The canary is usually ready already, so this happens immediately.
    previous = rollout.base if rollout.phase == "promoted" else []
    update = {"rollout": rollout, "targets": targets_of(rollout), "previous": previous}
    changed = spec.model_copy(update=update)
    scaled = rollover.with_minimum(snapshot, rollout, share_of(rollout)) if rollout.active else []
    return [*scaled, *rollover.replace_endpoint(snapshot.after(scaled), spec, changed)]


def withdrawn(spec: EndpointSpec, now: float) -> Rollout | None:
    """Return an Endpoint's rollout after a rollback. An unfinished promotion becomes ``rolled_back``."""
    rollout = spec.rollout
    if rollout is None or rollout.phase != "promoted" or not spec.previous:
        return rollout
    return _noted(
        rollout.model_copy(update={"phase": "rolled_back", "reason": "an operator rolled back"}), now
    )


def share_of(rollout: Rollout) -> int:
    """Return the canary's share in percent."""
    if rollout.phase == "promoted":
        return 100
    return rollout.options.steps[rollout.step] if rollout.active else 0


def targets_of(rollout: Rollout) -> list[Target]:
    """Return an Endpoint's targets in the current step: the baseline and the canary, with their weights."""
    share = share_of(rollout)
    canary = Target(deployment=rollout.deployment, weight=share * _SCALE)
    if share >= 100:
        return [Target(deployment=rollout.deployment)]
    if share == 0:
        return list(rollout.base)
    total = sum(target.weight for target in rollout.base)
    rest = (100 - share) * _SCALE
    return [*_scaled(rollout.base, rest, total), canary]


def _scaled(base: Sequence[Target], weight: int, total: int) -> list[Target]:
    """Return the baseline with weights whose sum is ``weight``. Rounding errors are below 0.01 %.

    ``total``: the sum of the weights in ``base``.
    """
    scaled = [
        Target(deployment=each.deployment, weight=max(1, round(each.weight * weight / total)))
        for each in base
    ]
    excess = sum(target.weight for target in scaled) - weight
    largest = max(range(len(scaled)), key=lambda index: scaled[index].weight)
    scaled[largest] = Target(deployment=scaled[largest].deployment, weight=scaled[largest].weight - excess)
    return scaled


def _noted(rollout: Rollout, now: float) -> Rollout:
    event = RolloutEvent(at=now, phase=rollout.phase, share=share_of(rollout), reason=rollout.reason)
    return rollout.model_copy(update={"history": [*rollout.history, event][-_EVENTS_KEPT:]})
