"""Canaries in the registry: shares of each step, promotion, going back, and what ends one."""

from __future__ import annotations

import pytest

from services.registry.domain import edits, rollback, rollouts, rollover, traffic_split
from services.registry.domain.rollback import EndpointHistory
from services.registry.domain.rollouts import Progress
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import CanaryOptions, Rollout, Target

pytestmark = pytest.mark.unit

OPTIONS = CanaryOptions(steps=[5, 50, 100])


def idle(book, version):
    """Create the Deployment of a version without traffic."""
    request = rollover.DeployRequest("digits", version, traffic=False)
    book.carry_out(rollover.deploy(book.now, request).changes)


@pytest.fixture
def canary(book):
    """An endpoint that serves version 1, with a canary of version 2."""
    book.deploy(version=1)
    book.settle()
    idle(book, 2)
    book.carry_out(rollouts.start(book.now, "digits", "digits-v2", OPTIONS, "r1", 100.0))
    return book


def weights(book):
    return {t.deployment: t.weight for t in book.now.endpoint("digits").spec.targets}


def rollout(book) -> Rollout:
    found = book.now.endpoint("digits").spec.rollout
    assert found is not None
    return found


def advance(book, phase, step=None, reason="because", id="r1", now=200.0):
    return book.carry_out(rollouts.advance(book.now, "digits", id, Progress(phase, reason, step), now))


def test_the_first_step(canary):
    assert weights(canary) == {"digits-v1": 95_000, "digits-v2": 5_000}
    assert (rollout(canary).step, rollout(canary).since) == (0, 100.0)


@pytest.fixture
def three(book):
    """An endpoint whose version 1 has at least three replicas, and a sleeping version 2."""
    book.deploy(version=1, min_replicas=3, max_replicas=6)
    book.settle()
    idle(book, 2)
    return book


def minimum(book, name="digits-v2"):
    return book.now.deployment(name).spec.min_replicas


def test_a_canary_has_its_share_of_the_replicas(three):
    three.carry_out(rollouts.start(three.now, "digits", "digits-v2", OPTIONS, "r1", 100.0))
    assert minimum(three) == 1
    advance(three, "running", 1)
    assert minimum(three) == 2
    assert minimum(three, "digits-v1") == 3, "the present version keeps its capacity"
    advance(three, "promoted", 1)
    assert minimum(three, "digits-v1") == 3, "it serves until the promoted version is ready"
    three.settle()
    assert (minimum(three), minimum(three, "digits-v1")) == (3, 0)


def test_a_canary_that_gets_all_traffic_by_hand_has_all_replicas(three):
    three.carry_out(rollouts.start(three.now, "digits", "digits-v2", OPTIONS, "r1", 100.0))
    three.carry_out(traffic_split.split(three.now, "digits", [Target(deployment="digits-v2")]))
    assert minimum(three) == 3


def test_full_capacity_and_declared_canaries_keep_their_minimum(three):
    full = OPTIONS.model_copy(update={"full_capacity": True})
    three.carry_out(rollouts.start(three.now, "digits", "digits-v2", full, "r1", 100.0))
    assert minimum(three) == 3


def test_a_resumed_step_begins_anew(three):
    three.carry_out(rollouts.start(three.now, "digits", "digits-v2", OPTIONS, "r1", 100.0))
    advance(three, "paused", now=4000.0)
    assert rollout(three).since == 100.0
    advance(three, "running", now=9000.0)
    assert rollout(three).since == 9000.0, "else it would pause again at once"


def test_a_promotion_that_waits_for_the_canary_can_be_rolled_back(canary):
    advance(canary, "promoted", 1)
    canary.carry_out(rollback.rollback(canary.now, "digits", None, EndpointHistory(), 300.0).changes)
    assert weights(canary) == {"digits-v1": 100}
    assert (rollout(canary).phase, rollout(canary).history[-1].at) == ("rolled_back", 300.0)


def test_a_first_step_of_all_traffic_is_refused(three):
    everything = CanaryOptions(steps=[100])
    with pytest.raises(BadRequest, match="--swap"):
        rollouts.start(three.now, "digits", "digits-v2", everything, "r1", 100.0)


def test_a_swap_sends_all_requests_to_the_new_version_and_puts_the_old_one_to_sleep(three):
    three.carry_out(rollouts.swap(three.now, "digits", "digits-v2", "r1", 100.0))
    assert weights(three) == {"digits-v2": 100}
    assert (minimum(three), minimum(three, "digits-v1")) == (3, 0)
    assert not three.now.endpoint("digits").spec.previous, "nothing waits for the new version"
    assert rollout(three).phase == "promoted"
    assert "swapped" in rollout(three).reason


def test_steps_and_promotion(canary):
    advance(canary, "running", 1)
    assert weights(canary) == {"digits-v1": 50_000, "digits-v2": 50_000}
    assert rollout(canary).since == 200.0
    assert advance(canary, "running", 1) == [], "a repeated decision changes nothing"
    advance(canary, "promoted", 1, "promoted: no harm")
    assert weights(canary) == {"digits-v2": 100}
    assert [t.deployment for t in canary.now.endpoint("digits").spec.previous] == ["digits-v1"]
    canary.settle()
    assert canary.now.deployment("digits-v1").spec.min_replicas == 0, "the old version goes to sleep"
    assert [(e.share, e.phase) for e in rollout(canary).history] == [
        (5, "running"), (50, "running"), (100, "promoted"),
    ]  # fmt: skip
    with pytest.raises(Conflict, match="has ended: promoted"):
        advance(canary, "running", 0, "again")


def test_rolling_back_needs_one_write(canary):
    advance(canary, "rolled_back", reason="errors: 3% against 0%")
    assert weights(canary) == {"digits-v1": 100}
    assert rollout(canary).reason == "errors: 3% against 0%"


def test_pausing_keeps_the_share(canary):
    advance(canary, "paused", 0, "an operator paused it")
    assert weights(canary)["digits-v2"] == 5_000
    advance(canary, "running", 0, "an operator resumed it")
    assert rollout(canary).active


def test_the_command_rollback_ends_a_canary(canary):
    plan = rollback.rollback(canary.now, "digits", None, EndpointHistory(), 300.0)
    canary.carry_out(plan.changes)
    assert (plan.deployment, plan.replaced, plan.version) == ("digits-v1", ["digits-v2"], 1)
    assert (rollout(canary).phase, weights(canary)) == ("rolled_back", {"digits-v1": 100})


def test_a_split_or_a_deploy_by_hand_aborts_a_canary(canary):
    before = canary.now
    targets = [Target(deployment="digits-v1", weight=1), Target(deployment="digits-v2", weight=1)]
    canary.carry_out(traffic_split.split(canary.now, "digits", targets))
    assert (rollout(canary).phase, weights(canary)) == ("aborted", {"digits-v1": 1, "digits-v2": 1})
    canary.now = before
    canary.deploy(version=2)
    assert rollout(canary).phase == "aborted"
    canary.now = before
    canary.put_endpoint("digits", targets=[{"deployment": "digits-v1"}])
    assert rollout(canary).phase == "aborted"


def test_other_options_of_the_endpoint_keep_the_canary(canary):
    spec = canary.now.endpoint("digits").spec
    fields = {"targets": [t.model_dump() for t in spec.targets], "when_unready": "others"}
    canary.carry_out(edits.put_endpoint(canary.now, "digits", fields))
    assert rollout(canary).active


def test_one_canary_at_a_time(canary):
    with pytest.raises(Conflict, match="has a rollout of digits-v2 already"):
        rollouts.start(canary.now, "digits", "digits-v2", OPTIONS, "r2", 1.0)
    advance(canary, "rolled_back")
    with pytest.raises(BadRequest, match="digits-v1 gets traffic of Endpoint 'digits' already"):
        rollouts.start(canary.now, "digits", "digits-v1", OPTIONS, "r2", 1.0)
    with pytest.raises(NotFound):
        rollouts.start(canary.now, "digits", "absent", OPTIONS, "r2", 1.0)


def test_decisions_about_another_rollout_are_refused(canary):
    with pytest.raises(Conflict, match="another rollout"):
        advance(canary, "promoted", id="old")
    with pytest.raises(BadRequest, match="no step 7"):
        advance(canary, "running", 7)
    canary.put_deployment("other", model="digits", version=1)
    canary.put_endpoint("second", targets=[{"deployment": "other"}])
    with pytest.raises(NotFound, match="has no rollout"):
        rollouts.advance(canary.now, "second", None, Progress("promoted", "x"), 1.0)


def test_a_base_of_several_keeps_its_proportions():
    base = [
        Target(deployment="a", weight=2),
        Target(deployment="b", weight=1),
        Target(deployment="c", weight=0),
    ]
    found = Rollout(deployment="d", base=base[:2], options=CanaryOptions(steps=[1, 100]))
    targets = rollouts.targets_of(found)
    assert sum(t.weight for t in targets) == 100_000
    assert [t.weight for t in targets] == [66_000, 33_000, 1_000]


@pytest.mark.parametrize("steps", [[5, 1], [5, 5], [0, 10], [101]])
def test_steps_must_rise(steps):
    with pytest.raises(ValueError):
        CanaryOptions(steps=steps)
