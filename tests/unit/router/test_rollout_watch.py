"""From the gateways' totals to ticks: deltas, frozen latencies, and a memory that survives a router."""

from __future__ import annotations

import orjson
import pytest

from services.router.domain.canary_health import CanaryHealth
from services.router.domain.rollout_watch import FREEZE_AT, RolloutWatch
from tidegate.kernel.protocol.latency_buckets import COUNT, bucket_of, upper_s
from tidegate.kernel.protocol.models import CanaryOptions, Rollout, Target
from tidegate.kernel.protocol.presence import GatewayReport, VariantCounts

pytestmark = pytest.mark.unit

ROLLOUT = Rollout(
    deployment="v2",
    base=[Target(deployment="v1")],
    id="r",
    options=CanaryOptions(steps=[10, 100], hold_s=0, min_samples=10),
)


def counts(answered: int, failed: int = 0, seconds: float = 0.01, slow: int = 0) -> VariantCounts:
    times = [0] * COUNT
    times[bucket_of(seconds)] = answered - slow
    times[bucket_of(seconds * 4)] = slow
    return VariantCounts(failed, times)


def report(gateway: str, **variants: VariantCounts) -> GatewayReport:
    return GatewayReport(gateway, 0.0, traffic={"m": variants})


def test_only_what_is_new_counts():
    watch = RolloutWatch("r")
    watch.observe("m", ROLLOUT, [report("g1", v1=counts(1000), v2=counts(100, failed=50))], 1.0)
    assert not watch.state.evidence["errors"].canary, "totals from before the rollout are no evidence"
    watch.observe("m", ROLLOUT, [report("g1", v1=counts(1090), v2=counts(110, failed=50))], 2.0)
    errors = watch.state.evidence["errors"]
    assert (errors.canary, errors.canary_bad, errors.base) == (10, 0, 90)
    # A second gateway process starts at zero, and the first one is gone.
    watch.observe("m", ROLLOUT, [report("g2", v1=counts(9), v2=counts(1))], 3.0)
    after = watch.state.evidence["errors"]
    assert after.canary == 11


def test_latencies_are_compared_with_the_frozen_baseline():
    watch = RolloutWatch("r")
    watch.observe("m", ROLLOUT, [report("g", v1=counts(0), v2=counts(0))], 1.0)
    watch.observe("m", ROLLOUT, [report("g", v1=counts(FREEZE_AT, slow=20), v2=counts(50))], 2.0)
    assert watch.slow_ms() is not None
    assert watch.slow_ms()[0] == pytest.approx(upper_s(bucket_of(0.01)) * 1e3)  # type: ignore[index]
    watch.observe("m", ROLLOUT, [report("g", v1=counts(FREEZE_AT + 90, slow=22), v2=counts(60, slow=8))], 3.0)
    assert watch.state.evidence["slow"].canary_bad == 8


def test_harm_rolls_back_and_says_why():
    watch = RolloutWatch("r")
    watch.observe("m", ROLLOUT, [report("g", v1=counts(0), v2=counts(0))], 1.0)
    decision = watch.observe("m", ROLLOUT, [report("g", v1=counts(900), v2=counts(70, failed=30))], 2.0)
    assert decision.verdict == "roll_back"
    assert "errors: 30.00% of 100 canary requests, against 0.00% of 900" in decision.reason


def test_a_verdict_that_was_not_stored_is_made_again():
    watch = RolloutWatch("r")
    watch.observe("m", ROLLOUT, [report("g", v1=counts(0), v2=counts(0))], 1.0)
    harm = [report("g", v1=counts(900), v2=counts(70, failed=30))]
    assert watch.observe("m", ROLLOUT, harm, 2.0).verdict == "roll_back"
    watch.undo(ROLLOUT)
    assert watch.observe("m", ROLLOUT, harm, 3.0).verdict == "roll_back"


def test_a_step_that_was_not_stored_keeps_its_samples():
    watch = RolloutWatch("r")
    long = ROLLOUT.model_copy(update={"options": ROLLOUT.options.model_copy(update={"steps": [10, 50, 100]})})
    watch.observe("m", long, [report("g", v1=counts(0), v2=counts(0))], 1.0)
    some = [report("g", v1=counts(90), v2=counts(10))]
    assert watch.observe("m", long, some, 2.0).verdict == "advance"
    watch.undo(long)
    assert watch.observe("m", long, some, 3.0).verdict == "advance"


def test_a_canary_without_replicas_says_why_and_one_that_never_loads_is_rolled_back():
    watch = RolloutWatch("r")
    quiet = [report("g", v1=counts(0), v2=counts(0))]
    held = watch.observe("m", ROLLOUT, quiet, 1.0, CanaryHealth("v2 has no ready replica yet"))
    assert (held.verdict, held.reason.split(";")[0]) == ("hold", "v2 has no ready replica yet")
    broken = watch.observe("m", ROLLOUT, quiet, 2.0, CanaryHealth(broken="v2 does not start: no weights"))
    assert (broken.verdict, broken.reason) == ("roll_back", "v2 does not start: no weights")
    assert "health" not in watch.to_json()


def test_the_memory_survives_a_router():
    watch = RolloutWatch("r")
    for at, total in enumerate((0, 600, 1200), 1):
        watch.observe("m", ROLLOUT, [report("g", v1=counts(total), v2=counts(total // 200))], float(at))
    again = RolloutWatch.from_json(orjson.loads(orjson.dumps(watch.to_json())))
    assert (again.state, again.seen, again.thresholds) == (watch.state, watch.seen, watch.thresholds)
    assert again.points == watch.points
    # What happened while no router ran counts when it is back.
    again.observe("m", ROLLOUT, [report("g", v1=counts(5000), v2=counts(200))], 90.0)
    assert again.state.evidence["errors"].base == 5000
