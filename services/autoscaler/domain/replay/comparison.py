"""A whole study: the Deployment's own policy, others of ours, others' formulas, all on the same arrivals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from services.autoscaler.domain.replay.controllers import Controller, DecideController, FormulaController
from services.autoscaler.domain.replay.fleet import ReplicaTiming
from services.autoscaler.domain.replay.formulas import Keda, Knative
from services.autoscaler.domain.replay.run import ReplayOutcome, replay, summary, timeline
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Deployment, Version

Other = Literal["keda", "knative"]

LIVE = "live"
MOST_LOOKS = 2_000_000
KNATIVE_SHARE = 0.7
SHOWN_DECISIONS = 200


@dataclass(frozen=True, slots=True)
class PolicyVariant:
    """Another policy of ours: what differs from the Deployment's own, as for a change of it."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to replay. ``start_at`` is the beginning in seconds since the epoch; a look every ``period_s``.
    ``history`` has the arrivals of the minutes (since the epoch) before, for policies with a forecast.
    """

    deployment: Deployment
    version: Version
    policy: Policy
    service: ReplicaTiming
    arrivals: Sequence[float]
    seconds: float
    start_at: float = 0.0
    period_s: float = 0.5
    seed: int = 0
    variants: Sequence[PolicyVariant] = ()
    others: Sequence[Other] = ()
    history: Mapping[int, int] = field(default_factory=dict)


def run(study: Comparison) -> dict[str, Any]:
    """Figures and courses of every policy. Raises BadRequest for what cannot be replayed."""
    controllers = _controllers(study)
    if study.seconds / study.period_s * len(controllers) > MOST_LOOKS:
        raise BadRequest(
            f"{study.seconds:.0f} s under {len(controllers)} policies are more than can be replayed at once."
        )
    own = study.deployment
    outcomes = [_outcome(study, controller) for controller in controllers]
    return {
        "deployment": own.name,
        "seconds": study.seconds,
        "start_at": study.start_at,
        "requests": len(study.arrivals),
        "service": asdict(study.service),
        "target_wait_ms": own.target_wait_ms,
        "price_per_hour": own.scaling.price_per_hour,
        "results": [summary(o, own.target_wait_ms, own.scaling.price_per_hour) for o in outcomes],
        "timelines": {o.name: timeline(o, study.seconds) for o in outcomes},
        "decisions": {o.name: [asdict(d) for d in o.decisions[-SHOWN_DECISIONS:]] for o in outcomes},
    }


def changed(deployment: Deployment, variant: PolicyVariant) -> Deployment:
    """The Deployment under another policy; null goes back to the default. Raises BadRequest."""
    plain = deployment.model_dump(mode="json")
    changes = dict(variant.changes)
    scaling = {**plain.pop("scaling"), **(changes.pop("scaling", None) or {})}
    plain |= {**changes, "scaling": {k: v for k, v in scaling.items() if v is not None}}
    try:
        found = Deployment.model_validate({k: v for k, v in plain.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise BadRequest(f"Policy {variant.name!r}: {where}: {first['msg']}.") from None
    if found.min_replicas > found.max_replicas or found.max_replicas < 1:
        raise BadRequest(f"Policy {variant.name!r}: min_replicas is above max_replicas.")
    return found


def _controllers(study: Comparison) -> list[Controller]:
    own = study.deployment
    policies = {LIVE: own} | {v.name: changed(own, v) for v in study.variants}
    found: list[Controller] = [
        DecideController(name, policy, study.version, study.policy, history=Counter(study.history))
        for name, policy in policies.items()
    ]
    # As many outstanding for each replica as make its wait just the target: what our own rule aims at.
    each = study.service.batch + own.target_wait_ms / study.service.call_ms * study.service.batch
    for other in study.others:
        formula = Keda(max(1.0, math.floor(each))) if other == "keda" else Knative(each * KNATIVE_SHARE)
        found.append(FormulaController(other, own, formula))
    names = [LIVE, *(variant.name for variant in study.variants), *study.others]
    if len(set(names)) < len(names):
        raise BadRequest(f"Each policy needs a name of its own: {', '.join(names)}.")
    return found


def _outcome(study: Comparison, controller: Controller) -> ReplayOutcome:
    return replay(
        study.arrivals,
        controller,
        study.service,
        seconds=study.seconds,
        start_at=study.start_at,
        period_s=study.period_s,
        seed=study.seed,
    )
