"""Compare scaling policies on the same arrivals.

The policies are the Deployment's own policy, variants of it, and the formulas of other autoscalers.
"""

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

KnownFormula = Literal["keda", "knative"]

LIVE = "live"
MOST_ROUNDS = 2_000_000
KNATIVE_SHARE = 0.7
SHOWN_DECISIONS = 200


@dataclass(frozen=True, slots=True)
class PolicyVariant:
    """A policy to compare. It consists of changes to the Deployment's own policy."""

    name: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The policies to compare, and the arrivals to replay, in seconds from the start.

    ``start_at`` is in seconds since the epoch; there is a round every ``period_s`` seconds. ``history`` has
    the earlier arrivals by minute since the epoch, for policies with a forecast.
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
    others: Sequence[KnownFormula] = ()
    history: Mapping[int, int] = field(default_factory=dict)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Return the figures and timelines of every policy. Raise BadRequest if the replay is too large."""
    controllers = _controllers(comparison)
    if comparison.seconds / comparison.period_s * len(controllers) > MOST_ROUNDS:
        raise BadRequest(
            f"A replay of {comparison.seconds:.0f} s with {len(controllers)} policies has too many rounds. "
            "Choose a shorter period or fewer policies."
        )
    own = comparison.deployment
    outcomes = [_outcome(comparison, controller) for controller in controllers]
    return {
        "deployment": own.name,
        "seconds": comparison.seconds,
        "start_at": comparison.start_at,
        "requests": len(comparison.arrivals),
        "service": asdict(comparison.service),
        "target_wait_ms": own.target_wait_ms,
        "price_per_hour": own.scaling.price_per_hour,
        "results": [summary(o, own.target_wait_ms, own.scaling.price_per_hour) for o in outcomes],
        "timelines": {o.name: timeline(o, comparison.seconds) for o in outcomes},
        "decisions": {o.name: [asdict(d) for d in o.decisions[-SHOWN_DECISIONS:]] for o in outcomes},
    }


def changed(deployment: Deployment, variant: PolicyVariant) -> Deployment:
    """Return the Deployment with the changes of ``variant``. A change to None sets the default.

    Raise BadRequest if the result is not valid.
    """
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


def _controllers(comparison: Comparison) -> list[Controller]:
    own = comparison.deployment
    policies = {LIVE: own} | {v.name: changed(own, v) for v in comparison.variants}
    found: list[Controller] = [
        DecideController(
            name, policy, comparison.version, comparison.policy, history=Counter(comparison.history)
        )
        for name, policy in policies.items()
    ]
    # ``each`` is the number of requests per replica at which the last request waits `target_wait_ms`. The
    # rule `wait` uses the same formula.
    at_once = comparison.service.batch * comparison.service.slots
    each = at_once + own.target_wait_ms / comparison.service.call_ms * at_once
    for other in comparison.others:
        formula = Keda(max(1.0, math.floor(each))) if other == "keda" else Knative(each * KNATIVE_SHARE)
        found.append(FormulaController(other, own, formula))
    names = [LIVE, *(variant.name for variant in comparison.variants), *comparison.others]
    if len(set(names)) < len(names):
        raise BadRequest(f"Each policy needs a different name: {', '.join(names)}.")
    return found


def _outcome(comparison: Comparison, controller: Controller) -> ReplayOutcome:
    return replay(
        comparison.arrivals,
        controller,
        comparison.service,
        seconds=comparison.seconds,
        start_at=comparison.start_at,
        period_s=comparison.period_s,
        seed=comparison.seed,
    )
