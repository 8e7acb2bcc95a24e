"""Test which logs of ended replicas are deleted."""

from __future__ import annotations

from services.autoscaler.domain.log_retention import MOST_EACH, EndedReplicaLog, LogLimits, overdue

LIMITS = LogLimits(keep_s=100, total_bytes=1000)


def log(name: str, written_at: float, size: int = 1, deployment: str = "m") -> EndedReplicaLog:
    return EndedReplicaLog(name, deployment, size, written_at)


def test_the_too_old_goes() -> None:
    assert overdue([log("old", 899), log("young", 901)], 1000, LIMITS) == ["old"]


def test_of_a_deployment_that_fails_again_and_again_the_oldest_go_and_of_others_none() -> None:
    failing = [log(f"m{at}", at, 100) for at in range(950, 960)]
    other = log("other", 940, 200, "other")
    assert overdue([*failing, other], 1000, LIMITS) == [f"m{at}" for at in range(957, 949, -1)]


def test_all_together_have_a_size() -> None:
    logs = [log(f"d{at}", at, 200, f"d{at}") for at in range(990, 1000)]
    assert overdue(logs, 1000, LIMITS) == ["d994", "d993", "d992", "d991", "d990"]


def test_many_small_ones_have_a_number() -> None:
    logs = [log(str(at), at) for at in range(950, 950 + MOST_EACH + 2)]
    assert overdue(logs, 1000, LogLimits(keep_s=200)) == ["951", "950"]
