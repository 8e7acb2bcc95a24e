"""Reported outcomes of a canary against its baseline's."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from services.router.domain.quality import FREEZE_AT, QualityWatch, limit_of
from services.router.domain.rollout_watch import RolloutWatch
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.models import CanaryOptions, Rollout, Target

pytestmark = pytest.mark.unit

ROLLOUT = Rollout(
    deployment="v2",
    base=[Target(deployment="v1")],
    id="r",
    options=CanaryOptions(steps=[10, 100], hold_s=0, min_samples=1, metric="score"),
)


def record(deployment: str, value: float | None, **given: object) -> FeedbackRecord:
    fields = {"metric": "score", "answered_at": 5000, "assigned": True} | given
    return FeedbackRecord("m", deployment, "1", "id", value=value, label=None, at=6000, **fields)  # type: ignore[arg-type]


def learned(values: list[float], **options: object) -> tuple[QualityWatch, Rollout]:
    rollout = ROLLOUT.model_copy(update={"options": ROLLOUT.options.model_copy(update=options)})
    watch = QualityWatch(since=1000)
    assert watch.missing().startswith(f"quality: feedback on {FREEZE_AT} more")
    assert watch.take("m", rollout, [record("v1", value) for value in values]) is None
    assert not watch.missing()
    return watch, rollout


def test_only_random_answers_of_this_rollout_and_metric_count() -> None:
    watch, rollout = learned([1.0] * 90 + [0.0] * 10)
    others = [
        record("v2", 0.0, metric="reward"),
        record("v2", 0.0, assigned=False),
        record("v2", 0.0, answered_at=999),
        record("v2", None),
        FeedbackRecord("other", "v2", "1", "id", "score", 0.0, None, 6000, 5000),
    ]
    assert watch.take("m", rollout, others) is None
    assert watch.canary.count == 0


def test_a_tick_waits_for_outcomes_of_both_sides() -> None:
    watch, rollout = learned([1.0] * 90 + [0.0] * 10)
    assert watch.take("m", rollout, [record("v1", 0.0), record("v1", 1.0)]) is None
    tick = watch.take("m", rollout, [record("v2", 0.0)])
    assert tick is not None
    assert (tick.canary, tick.canary_bad, tick.base, tick.base_bad) == (1, 1, 2, 1)
    assert watch.take("m", rollout, []) is None


@pytest.mark.parametrize(
    ("values", "sign", "bad", "good"),
    [
        ([1.0] * 90 + [0.0] * 10, 1, 0.0, 1.0),
        ([0.0] * 80 + [1.0] * 20, 1, 0.0, 1.0),  # mostly bad: the quartile itself is bad
        ([1.0] * 100, 1, 0.0, 1.0),
        ([float(n) for n in range(100)], 1, 24.0, 25.0),
        ([float(n) for n in range(100)], -1, 80.0, 70.0),
    ],
)
def test_the_limit_of_a_bad_outcome(values: list[float], sign: int, bad: float, good: float) -> None:
    limit = limit_of(values, sign)
    assert limit.is_bad(bad)
    assert not limit.is_bad(good)


def run(difference: float, seed: int) -> tuple[str, str]:
    """Return how a rollout ends in which the canary's scores are lower by a part of their deviation."""
    rng, watch = np.random.default_rng(seed), RolloutWatch("r")
    phase, reason = "running", ""
    for second in range(1, 1500):
        scores = [record("v1", float(value)) for value in rng.normal(0, 1, 9)]
        scores += [record("v2", float(rng.normal(-difference, 1)))]
        decision = watch.observe("m", ROLLOUT, [], float(second), feedback=scores)
        phase, reason = decision.state.phase, decision.reason
        if phase != "running":
            break
    return phase, reason


def test_worse_scores_roll_back_and_equal_ones_do_not() -> None:
    assert not [seed for seed in range(5) if run(0.0, seed)[0] == "rolled_back"]
    worse = [run(0.5, seed) for seed in range(5)]
    assert {phase for phase, _ in worse} == {"rolled_back"}
    assert all(reason.startswith("quality: ") for _, reason in worse)


def test_the_memory_of_outcomes_survives_a_router() -> None:
    watch = RolloutWatch("r")
    scores = [record("v1", float(n % 10)) for n in range(120)] + [record("v2", 3.0)]
    watch.quality.position = "5-0"
    watch.observe("m", ROLLOUT, [], 1.0, feedback=scores)
    again = RolloutWatch.from_json(orjson.loads(orjson.dumps(watch.to_json())))
    assert again.quality == watch.quality
    old = watch.to_json()
    del old["quality"]
    assert RolloutWatch.from_json(old).quality == QualityWatch()
