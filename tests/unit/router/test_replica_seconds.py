"""Seconds in which a replica has requests and answers none."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.router.domain.replica_seconds import Reading, readings, stalled, tick_of
from services.router.domain.rollout_watch import RolloutWatch
from tidegate.kernel.protocol.models import CanaryOptions, Rollout, Target
from tidegate.kernel.protocol.presence import ReplicaReport

pytestmark = pytest.mark.unit

ROLLOUT = Rollout(
    deployment="v2",
    base=[Target(deployment="v1")],
    id="r",
    options=CanaryOptions(steps=[10, 100]),
)


def report(deployment: str, inflight: int, done: int, slot: int = 0, **given: Any) -> ReplicaReport:
    fields: dict[str, Any] = {"state": "ready", "call_ms": 5.0, "inflight": inflight, "completed": done}
    fields |= given
    name = f"{deployment}-{slot}-1"
    return ReplicaReport(name, deployment, generation=1, host="h", pid=1, **fields)


@pytest.mark.parametrize(
    "given",
    [{"call_ms": None}, {"call_ms": 900.0}, {"state": "draining"}, {"signature": {"decoupled": True}}],
)
def test_only_ready_replicas_with_quick_calls_are_read(given: dict[str, Any]) -> None:
    assert readings([report("v1", 1, 2, failed=3)], frozenset({"v1"})) == {"v1-0-1": Reading(1, 5)}
    assert readings([report("v1", 1, 2, **given)], frozenset({"v1"})) == {}
    assert readings([report("v1", 1, 2)], frozenset({"v2"})) == {}


def test_a_stall_is_a_second_with_requests_and_without_answers() -> None:
    before = {
        "idle": Reading(0, 5),
        "quick": Reading(0, 5),
        "works": Reading(2, 5),
        "stalls": Reading(2, 5),
        "gone": Reading(1, 1),
    }
    now = {
        "idle": Reading(1, 5),
        "quick": Reading(0, 7),
        "works": Reading(2, 6),
        "stalls": Reading(1, 5),
        "new": Reading(1, 0),
    }
    assert stalled(before, now) == (3, 1)
    assert tick_of((0, 0), (2, 1)) is tick_of((2, 1), (0, 0)) is None


def rolled_back_after(stalls: bool) -> tuple[int, str]:
    """Return after how many seconds a canary is rolled back whose replica hangs, or does not; 0: never."""
    watch, done = RolloutWatch("r"), 0
    for second in range(1, 200):
        done += 0 if stalls else 10
        replicas = [report("v1", 1, second * 10, slot) for slot in range(3)] + [report("v2", 1, done)]
        decision = watch.observe("m", ROLLOUT, [], float(second), replicas=replicas)
        if decision.verdict == "roll_back":
            return second, decision.reason
    return 0, ""


def test_a_canary_whose_replica_hangs_is_rolled_back() -> None:
    seconds, reason = rolled_back_after(stalls=True)
    assert 20 < seconds < 60, "one block of ten seconds cannot decide"
    assert reason.startswith("stalled_seconds: 100.00% of")
    assert rolled_back_after(stalls=False) == (0, "")


def test_the_readings_survive_a_router() -> None:
    watch = RolloutWatch("r")
    watch.observe("m", ROLLOUT, [], 1.0, replicas=[report("v1", 1, 2), report("v2", 3, 4)])
    again = RolloutWatch.from_json(orjson.loads(orjson.dumps(watch.to_json())))
    assert again.replicas == watch.replicas == {"v1-0-1": Reading(1, 2), "v2-0-1": Reading(3, 4)}
