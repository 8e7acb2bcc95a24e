"""Test the status of a model whose process died while the replica goes on."""

from __future__ import annotations

import pytest

from services.autoscaler.domain.explain import explain
from tests.unit.autoscaler.conftest import World
from tidegate.cli.health import deployment_row
from tidegate.kernel.protocol.presence import ModelDeath, ReplicaReport

pytestmark = pytest.mark.unit

NAME, REPLICA = "digits-v1", "digits-v1-0-1"
WORDS = "the model's process ended (signal 9, out of memory?)"


def died(world: World, in_a_row: int = 1, back_after_s: float = 2.0) -> None:
    worker = world.workers[REPLICA]
    worker.death = ModelDeath(world.now, WORDS, -9, in_a_row, in_a_row, world.now + back_after_s)
    worker.ready_at = world.now + back_after_s


def test_a_replica_that_loads_its_model_again_is_not_ready(make_world, deployment) -> None:
    world = make_world(deployment())
    world.run(5)
    died(world)
    world.run(1)
    status = world.statuses[NAME]
    assert (status.ready, status.starting, status.replicas[0]["state"]) == (0, 1, "starting")
    condition = world.condition("Healthy")
    assert (condition.ok, condition.reason) == (False, "ModelDied")
    assert condition.message.startswith(f"{WORDS} at {REPLICA}, last 0 s ago; the next start is in")
    world.run(5)
    assert (world.statuses[NAME].ready, world.condition("Healthy").ok) == (1, True)
    assert world.killed == [], "it goes on"


def test_the_death_is_told_once_after_it(make_world, deployment) -> None:
    world = make_world(deployment())
    world.run(5)
    died(world)
    at = world.now
    world.run(30)
    (ended,) = world.statuses[NAME].ended
    assert (ended["replica"], ended["cause"], ended["at"]) == (REPLICA, "model died", at)
    died(world, in_a_row=2)
    world.run(30)
    (ended,) = world.statuses[NAME].ended
    assert ended["message"] == f"{WORDS}, 2 times in a row"


def test_deaths_in_a_row_are_the_deployments_condition_with_the_next_step(make_world, deployment) -> None:
    world = make_world(deployment())
    world.run(5)
    died(world, in_a_row=5)
    world.run(30)
    condition = world.condition("Healthy")
    assert condition.reason == "CrashLoop", "it stays so while it serves between two deaths"
    for words in ("5 times in a row", "the replica serves again", f"`tidegate logs {NAME}`", "memory_mb"):
        assert words in condition.message
    (wanted,) = world.deployments
    held = explain(wanted, world.snapshot(), world.state, world.policy, world.now)["holds"]
    assert any(WORDS in text for text in held)
    world.run(40)
    assert world.condition("Healthy").ok, "after a quiet minute"


def test_status_shows_it_in_words(make_world, deployment, monkeypatch) -> None:
    world = make_world(deployment())
    monkeypatch.setattr("tidegate.cli.health.time.time", lambda: world.now)
    world.run(5)
    died(world)
    world.run(1)
    assert deployment_row(world.statuses[NAME].model_dump(), None)[-1].startswith(f"ModelDied: {WORDS}")
    world.run(9)
    assert deployment_row(world.statuses[NAME].model_dump(), None)[-1] == f"serves again; 10 s ago {WORDS}"
    world.run(700)
    assert deployment_row(world.statuses[NAME].model_dump(), None)[-1] == ""


def test_what_a_replica_that_serves_says_of_its_model_is_told(make_world, deployment) -> None:
    world = make_world(deployment())
    world.run(5)
    world.workers[REPLICA].remark = "2 answers contradict the signature: the output 'y' has 99 columns"
    world.run(1)
    (wanted,) = world.deployments
    held = explain(wanted, world.snapshot(), world.state, world.policy, world.now)["holds"]
    assert held[-1] == f"{REPLICA}: 2 answers contradict the signature: the output 'y' has 99 columns"
    assert deployment_row(world.statuses[NAME].model_dump(), None)[-1].startswith("2 answers contradict")


def test_a_report_takes_its_death_along() -> None:
    death = ModelDeath(1.0, WORDS, -9, 2, 3, 4.0)
    sent = ReplicaReport("r", "d", 1, "h", 1, "starting", death=death)
    assert ReplicaReport.from_json(sent.to_json()) == sent
    newer = sent.to_json().replace(b'"in_a_row"', b'"later":1,"in_a_row"')
    assert ReplicaReport.from_json(newer) == sent
