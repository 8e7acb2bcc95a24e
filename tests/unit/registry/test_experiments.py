"""Experiments in the registry: targets, sticky keys, what ends one, and what is refused."""

from __future__ import annotations

import pytest

from services.registry.domain import edits, experiments, rollback, rollouts, rollover, traffic_split
from services.registry.domain.rollback import EndpointHistory
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.experiments import Experiment, ExperimentMetric, ExperimentOptions
from tidegate.kernel.protocol.models import CanaryOptions, EndpointSpec, StickyTraffic, Target

pytestmark = pytest.mark.unit

OPTIONS = ExperimentOptions(share=40)
UNIT = StickyTraffic(by="header", name="X-Unit-Id")


def idle(book, *numbers):
    """Create the Deployments of versions without traffic."""
    for version in numbers:
        request = rollover.DeployRequest("digits", version, traffic=False)
        book.carry_out(rollover.deploy(book.now, request).changes)


@pytest.fixture
def two(book):
    """An endpoint that serves version 1; versions 2 and 3 sleep."""
    book.deploy(version=1)
    book.settle()
    idle(book, 2, 3)
    return book


@pytest.fixture
def running(two):
    """An experiment of version 2."""
    start(two, "digits-v2")
    return two


def start(book, *treatments, options=OPTIONS, now=100.0):
    book.carry_out(experiments.start(book.now, "digits", treatments, options, "x1", now))


def spec(book) -> EndpointSpec:
    return book.now.endpoint("digits").spec


def experiment(book) -> Experiment:
    found = spec(book).experiment
    assert found is not None
    return found


def weights(book):
    return {t.deployment: t.weight for t in spec(book).targets}


def test_the_start(running):
    assert weights(running) == {"digits-v1": 60_000, "digits-v2": 40_000}
    assert spec(running).sticky == UNIT
    assert (experiment(running).control, experiment(running).since) == ("digits-v1", 100.0)
    assert spec(running).collects_feedback
    assert running.now.deployment("digits-v2").spec.min_replicas == 1, "it was asleep"


def test_several_treatments_share_equally(two):
    start(two, "digits-v2", "digits-v3")
    assert weights(two) == {"digits-v1": 120_000, "digits-v2": 40_000, "digits-v3": 40_000}


def test_own_sticky_keys_stay(two):
    two.put_endpoint("digits", targets=[{"deployment": "digits-v1"}], sticky={"by": "key"})
    start(two, "digits-v2")
    assert spec(two).sticky == StickyTraffic(by="key")
    two.carry_out(experiments.end(two.now, "digits", None, "stopped", "enough", 200.0))
    assert spec(two).sticky == StickyTraffic(by="key")


def test_an_end_gives_the_control_all_traffic(running):
    running.carry_out(experiments.end(running.now, "digits", "x1", "complete", "all samples", 200.0))
    assert weights(running) == {"digits-v1": 100}
    assert spec(running).sticky is None
    assert (experiment(running).phase, experiment(running).ended) == ("complete", 200.0)
    assert running.now.deployment("digits-v2").spec.min_replicas == 0
    assert [event.phase for event in experiment(running).history] == ["running", "complete"]
    assert experiments.end(running.now, "digits", "x1", "complete", "all samples", 300.0) == []
    with pytest.raises(Conflict, match="has ended already: complete"):
        experiments.end(running.now, "digits", None, "stopped", "", 300.0)


def test_the_winner_serves_alone(running):
    running.carry_out(experiments.choose(running.now, "digits", "digits-v2", 200.0))
    assert weights(running) == {"digits-v2": 100}
    assert not spec(running).previous, "it has a ready replica already"
    assert (experiment(running).phase, experiment(running).winner) == ("decided", "digits-v2")
    assert running.now.deployment("digits-v1").spec.min_replicas == 0
    assert experiments.choose(running.now, "digits", "digits-v2", 300.0) == []


def test_a_winner_after_the_end_rolls_over(running):
    running.carry_out(experiments.end(running.now, "digits", None, "complete", "", 200.0))
    running.carry_out(experiments.choose(running.now, "digits", "digits-v2", 300.0))
    assert weights(running) == {"digits-v2": 100}
    assert [each.deployment for each in spec(running).previous] == ["digits-v1"]
    assert running.now.deployment("digits-v2").spec.min_replicas == 1


def test_a_winner_must_be_a_variant(running):
    with pytest.raises(BadRequest, match="Choose one of digits-v1, digits-v2"):
        experiments.choose(running.now, "digits", "digits-v3", 200.0)


def test_only_one_canary_or_experiment(running):
    canary = CanaryOptions()
    with pytest.raises(Conflict, match="running experiment with digits-v2"):
        rollouts.start(running.now, "digits", "digits-v3", canary, "r1", 200.0)
    with pytest.raises(Conflict, match="running experiment"):
        start(running, "digits-v3")
    running.carry_out(experiments.end(running.now, "digits", None, "stopped", "", 200.0))
    running.carry_out(rollouts.start(running.now, "digits", "digits-v3", canary, "r1", 200.0))
    with pytest.raises(Conflict, match="has a rollout of digits-v3"):
        start(running, "digits-v2")
    with pytest.raises(Conflict, match="has a rollout of digits-v3"):
        experiments.choose(running.now, "digits", "digits-v2", 300.0)


def test_a_wrong_start_is_refused(two):
    with pytest.raises(BadRequest, match="is the control"):
        start(two, "digits-v1")
    with pytest.raises(BadRequest, match="Name each treatment only once"):
        start(two, "digits-v2", "digits-v2")
    with pytest.raises(NotFound):
        start(two, "digits-v9")
    with pytest.raises(NotFound, match="no experiment"):
        experiments.end(two.now, "digits", None, "stopped", "", 200.0)
    two.put_endpoint(
        "digits", targets=[{"deployment": "digits-v1"}, {"deployment": "digits-v2"}], previous=[]
    )
    with pytest.raises(Conflict, match="2 Deployments share the traffic"):
        start(two, "digits-v3")


@pytest.mark.parametrize("by", ["split", "deploy", "put"])
def test_other_targets_abort_it(running, by):
    if by == "split":
        running.carry_out(traffic_split.split(running.now, "digits", [Target(deployment="digits-v1")]))
    elif by == "deploy":
        running.deploy(version=3)
    else:
        running.put_endpoint("digits", targets=[{"deployment": "digits-v3"}])
    assert experiment(running).phase == "aborted"
    assert spec(running).sticky is None


def test_a_file_without_it_lets_it_go_on(running):
    assert running.put_endpoint("digits", targets=[{"deployment": "digits-v1"}]) == []
    assert experiment(running).active


def test_a_rollback_stops_it(running):
    plan = rollback.rollback(running.now, "digits", None, EndpointHistory(), 200.0)
    running.carry_out(plan.changes)
    assert (plan.deployment, plan.replaced) == ("digits-v1", ["digits-v2"])
    assert (experiment(running).phase, weights(running)) == ("stopped", {"digits-v1": 100})


def apply(book, stated, now):
    """Apply a file at a time."""
    return edits.apply(
        book.now, [], [stated], lambda held, name, fields: edits.put_endpoint(held, name, fields, now=now)
    )


def test_a_file_starts_one_experiment(two):
    stated = {
        "name": "digits",
        "targets": [{"deployment": "digits-v1"}],
        "experiment": {"treatments": ["digits-v2"], "options": {"share": 40}},
    }
    changes, outcomes = apply(two, stated, 100.0)
    two.carry_out(changes)
    assert outcomes[0].action == "updated"
    assert weights(two) == {"digits-v1": 60_000, "digits-v2": 40_000}
    assert (experiment(two).since, experiment(two).control) == (100.0, "digits-v1")
    changes, outcomes = apply(two, stated, 200.0)
    assert (changes, outcomes[0].action) == ([], "unchanged")
    two.carry_out(experiments.end(two.now, "digits", None, "complete", "", 300.0))
    changes, outcomes = apply(two, stated, 400.0)
    assert (changes, outcomes[0].action) == ([], "unchanged"), "the same statement starts it once"
    other = {**stated, "experiment": {"treatments": ["digits-v3"]}}
    two.carry_out(apply(two, other, 500.0)[0])
    assert experiment(two).treatments == ["digits-v3"]
    with pytest.raises(Conflict, match="cannot be changed"):
        apply(two, stated, 600.0)


def test_a_file_creates_an_endpoint_with_an_experiment(two):
    stated = {
        "name": "new",
        "targets": [{"deployment": "digits-v1"}],
        "experiment": {"treatments": ["digits-v2"]},
    }
    two.carry_out(apply(two, stated, 100.0)[0])
    found = two.now.endpoint("new").spec
    assert found.experiment is not None
    assert found.experiment.active
    assert len(found.targets) == 2


def test_sticky_keys_stay_while_it_runs(running):
    fields = spec(running).model_dump() | {"sticky": {"by": "key"}}
    with pytest.raises(Conflict, match="sticky keys of the running experiment"):
        edits.put_endpoint(running.now, "digits", fields)
    same = spec(running).model_dump()
    assert edits.put_endpoint(running.now, "digits", same) == []
    longer = same | {"default_timeout_ms": 5}
    running.carry_out(edits.put_endpoint(running.now, "digits", longer))
    assert experiment(running).active


def test_metrics():
    with pytest.raises(ValueError, match="needs a label"):
        ExperimentMetric(name="class", kind="rate")
    with pytest.raises(ValueError, match="the same name"):
        ExperimentOptions(metrics=[ExperimentMetric(name="a"), ExperimentMetric(name="a")])
