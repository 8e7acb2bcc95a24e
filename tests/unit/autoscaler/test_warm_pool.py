"""Test how many workers wait without a model, and which pool serves a Deployment."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.autoscaler.domain.launcher import (
    Running,
    deployment_of_pool,
    parse_replica,
    pool_fingerprint,
    pool_of,
    replica_name,
)
from services.autoscaler.domain.warm_pool import (
    SILENT_S,
    PoolMemory,
    WarmClaim,
    as_replica,
    plan_pool,
    pool_for,
)
from services.autoscaler.settings import AutoscalerSettings
from tests.unit.autoscaler.conftest import START, a_deployment
from tidegate.kernel.protocol.models import Resources
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.warm_pool import WarmPoolSpec

CPU = WarmPoolSpec(workers=2)


def waiting(number: int, *, alive: bool = True, pool: str = "cpu", born: float = START) -> Running:
    name = replica_name(deployment_of_pool(pool), 0, number)
    return Running(name, deployment_of_pool(pool), 0, number, 1, alive, born, pool_fingerprint(CPU))


def reports(*rows: Running, state: str = "warm", message: str = "") -> dict[str, ReplicaReport]:
    return {
        row.replica: ReplicaReport(row.replica, row.deployment, row.generation, "h", 1, state, message)  # type: ignore[arg-type]
        for row in rows
    }


def test_names_of_the_pool_are_names_of_no_deployment():
    name = replica_name(deployment_of_pool("cpu"), 0, 3)
    assert name == "warm-cpu--0-3"
    parsed = parse_replica(name)
    assert parsed == ("warm-cpu-", 0, 3)
    assert pool_of(parsed[0]) == "cpu"
    assert pool_of("warm-cpu") is None
    with pytest.raises(ValidationError):
        a_deployment(name=deployment_of_pool("cpu"))


def test_a_deployment_uses_the_pool_with_its_image_and_resources():
    pools = {
        "cpu": CPU,
        "gpu": WarmPoolSpec(resources=Resources(gpus=1)),
        "own": WarmPoolSpec(image="ours/worker"),
    }
    assert pool_for(a_deployment(), pools) == "cpu"
    assert pool_for(a_deployment(threads=4, env={"A": "b"}), pools) == "cpu"
    assert pool_for(a_deployment(resources={"gpus": 1}), pools) == "gpu"
    assert pool_for(a_deployment(image="ours/worker"), pools) == "own"
    assert pool_for(a_deployment(resources={"memory_mb": 512}), pools) is None
    assert pool_for(a_deployment(), {"cpu": WarmPoolSpec(workers=0)}) is None


def test_what_is_missing_is_started_and_what_waits_can_be_had():
    plan, _ = plan_pool({"cpu": CPU}, [], {}, PoolMemory(), START)
    assert plan.launch == ("cpu", "cpu")
    first, second = waiting(1), waiting(2)
    plan, _ = plan_pool({"cpu": CPU}, [first, second], reports(first), PoolMemory(), START + 1)
    assert (plan.launch, plan.kill) == ((), ())
    assert plan.idle == {"cpu": {first.replica}}


def test_of_too_many_those_go_that_cannot_be_had_yet():
    rows = [waiting(1), waiting(2, born=START + 1), waiting(3, born=START + 2)]
    plan, _ = plan_pool({"cpu": CPU}, rows, reports(rows[0], rows[2]), PoolMemory(), START + 3)
    assert [worker for worker, _ in plan.kill] == [rows[1].replica]


def test_workers_of_a_changed_or_removed_pool_are_ended():
    rows = [waiting(1), waiting(1, pool="old")]
    changed = {"cpu": WarmPoolSpec(workers=1, threads=8)}
    plan, _ = plan_pool(changed, rows, reports(*rows), PoolMemory(), START + 1)
    assert {worker for worker, _ in plan.kill} == {row.replica for row in rows}
    assert plan.launch == ("cpu",)


@pytest.mark.parametrize(
    ("row", "told", "later_s", "why"),
    [
        (waiting(1, alive=False), {}, 1, "the worker's process has ended"),
        (waiting(1), reports(waiting(1), state="failed", message="no Triton"), 1, "no Triton"),
        (waiting(1), {}, 130, "not ready after 120 s"),
        (waiting(1), reports(waiting(1), state="starting"), 130, "not ready after 120 s"),
    ],
)
def test_one_that_is_not_well_is_ended_and_the_next_one_waits(row, told, later_s, why):
    one = {"cpu": WarmPoolSpec(workers=1)}
    now = START + later_s
    plan, memory = plan_pool(one, [row], told, PoolMemory(), now)
    assert plan.kill == ((row.replica, why),)
    assert plan.launch == ()
    assert memory.failures["cpu"].message == why
    plan, memory = plan_pool(one, [], {}, memory, now + 1.0)
    assert plan.launch == ("cpu",)
    # Another failure doubles the wait. An idle worker ends the failures.
    plan, memory = plan_pool(one, [row], told, memory, now + 1.0)
    assert plan_pool(one, [], {}, memory, now + 2.5)[0].launch == ()
    assert plan_pool(one, [], {}, memory, now + 3.0)[0].launch == ("cpu",)
    good = waiting(2, born=now + 3.0)
    assert "cpu" not in plan_pool(one, [good], reports(good), memory, now + 3.0)[1].failures


def test_one_that_fell_silent_is_not_offered_anything_and_then_given_up():
    row = waiting(1)
    one = {"cpu": WarmPoolSpec(workers=1)}
    _, memory = plan_pool(one, [row], reports(row), PoolMemory(), START + 300)
    plan, memory = plan_pool(one, [row], {}, memory, START + 300 + SILENT_S)
    assert (plan.kill, plan.idle) == ((), {"cpu": frozenset()})
    plan, _ = plan_pool(one, [row], {}, memory, START + 301 + SILENT_S)
    assert plan.kill == ((row.replica, f"no heartbeat for {SILENT_S:g} s"),)


def test_silence_counts_from_when_it_could_be_heard():
    """A store outage, or a new leader, is not counted as missed heartbeats."""
    row = waiting(1)
    one = {"cpu": WarmPoolSpec(workers=1)}
    since = START + 1000
    for memory in (PoolMemory(), PoolMemory({row.replica: START + 300})):
        plan, _ = plan_pool(one, [row], {}, memory, since + SILENT_S, since)
        assert (plan.kill, plan.launch) == ((), ())
        plan, _ = plan_pool(one, [row], {}, memory, since + SILENT_S + 1, since)
        assert [worker for worker, _ in plan.kill] == [row.replica]


@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.booleans(), st.sampled_from(["warm", "starting", "failed", "silent"])), max_size=8),
)
def test_after_every_look_the_number_is_right(wanted, rows):
    pools = {"cpu": WarmPoolSpec(workers=wanted)}
    there = [waiting(number, alive=alive) for number, (alive, _) in enumerate(rows)]
    told = [(row, state) for row, (_, state) in zip(there, rows, strict=True) if state != "silent"]
    heartbeats = {name: each for row, state in told for name, each in reports(row, state=state).items()}
    plan, memory = plan_pool(pools, there, heartbeats, PoolMemory(), START + 1)
    ended = {worker for worker, _ in plan.kill}
    after = len(there) - len(ended) + len(plan.launch)
    assert after == wanted or (after < wanted and memory.failures["cpu"].not_before > START + 1)
    assert plan.idle["cpu"] <= {row.replica for row in there if row.alive} - ended


def test_a_worker_that_became_a_replica_is_known_by_both_names():
    worker = waiting(4)
    claim = WarmClaim("digits-v1-2-7", "f", START + 5, 30.0, worker.replica)
    found = as_replica(worker, claim, ("digits-v1", 2, 7))
    assert (found.replica, found.deployment, found.slot, found.generation) == (
        "digits-v1-2-7", "digits-v1", 2, 7,
    )  # fmt: skip
    assert (found.launched_at, found.fingerprint, found.drain_limit_s) == (START + 5, "f", 30.0)
    assert (found.worker, found.alive) == (worker.replica, True)


def test_the_setting_takes_a_number_or_the_whole(monkeypatch):
    monkeypatch.setenv("TIDEGATE_AUTOSCALER_WARM", '{"cpu": 2, "gpu": {"resources": {"gpus": 1}}}')
    found = AutoscalerSettings().autoscaler_warm
    assert found == {"cpu": WarmPoolSpec(workers=2), "gpu": WarmPoolSpec(resources=Resources(gpus=1))}
    monkeypatch.setenv("TIDEGATE_AUTOSCALER_WARM", '{"GPU.big": 1}')
    with pytest.raises(ValidationError, match="a pool's name may contain only lower case letters"):
        AutoscalerSettings()
