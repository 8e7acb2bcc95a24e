from __future__ import annotations

from dataclasses import replace

import pytest

from services.registry.domain import rollover
from services.registry.domain.desired_state import PutDeployment, notification_of
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import Override


def test_first_deploy_makes_deployment_and_endpoint(book):
    changes = book.deploy(version=1)
    assert [notification_of(change).action for change in changes] == ["created", "created"]
    assert book.targets() == (["digits-v1"], [])


def test_deploy_takes_the_latest_version_by_default(book):
    book.deploy()
    assert book.targets() == (["digits-v3"], [])


def test_same_deploy_again_changes_nothing(book):
    book.deploy(version=1, min_replicas=2)
    assert book.deploy(version=1, min_replicas=2) == []
    assert book.deploy(version=1) == []


def test_same_version_with_another_option_changes_only_that(book):
    book.deploy(version=1, min_replicas=2, threads=3)
    changes = book.deploy(version=1, min_replicas=4)
    assert [notification_of(change).name for change in changes] == ["digits-v1"]
    assert book.now.deployment("digits-v1").spec.threads == 3
    assert book.scale("digits-v1") == (4, 4, None)


def test_next_version_inherits_options_and_old_one_serves_until_settled(book):
    book.deploy(version=1, min_replicas=2, max_replicas=5, threads=4, batching={"window_ms": 3})
    book.deploy(version=2, batching={"max_batch": 8})
    spec = book.now.deployment("digits-v2").spec
    assert (spec.threads, spec.batching.window_ms, spec.batching.max_batch) == (4, 3, 8)
    assert book.scale("digits-v2") == (2, 5, None)
    assert book.targets() == (["digits-v2"], ["digits-v1"])
    assert book.scale("digits-v1") == (2, 5, None), "still serving"

    book.settle()
    assert book.targets() == (["digits-v2"], [])
    assert book.scale("digits-v1") == (0, 5, 30.0)
    assert book.settle() == []


def test_a_version_that_was_never_ready_is_not_previous(book):
    book.deploy(version=1)
    book.deploy(version=2)
    book.deploy(version=3)
    assert book.targets() == (["digits-v3"], ["digits-v1"])
    assert book.scale("digits-v2")[0] == 0, "nobody sends it traffic any more"
    assert book.scale("digits-v1")[0] == 1


def test_going_back_before_settling_needs_no_roll_over(book):
    book.deploy(version=1)
    book.deploy(version=2, min_replicas=5)
    book.deploy(version=1)
    assert book.targets() == (["digits-v1"], [])
    assert book.scale("digits-v1")[0] == 1
    assert book.scale("digits-v2")[0] == 0


def test_going_back_after_settling_wakes_the_old_one_at_the_current_scale(book):
    book.deploy(version=1, threads=2)
    book.deploy(version=2, min_replicas=3, max_replicas=6, threads=8)
    book.settle()
    book.deploy(version=1)
    assert book.scale("digits-v1") == (3, 6, None)
    assert book.now.deployment("digits-v1").spec.threads == 2
    assert book.targets() == (["digits-v1"], ["digits-v2"])


def test_settling_removes_the_override_of_a_sleeping_deployment(book):
    book.deploy(version=1)
    held = book.now.deployment("digits-v1")
    book.carry_out([PutDeployment(replace(held, override=Override(replicas=4)), created=False)])
    book.deploy(version=2)
    book.settle()
    assert book.now.deployment("digits-v1").override is None


def test_declared_deployments_keep_their_scale(book):
    for number in (1, 2):
        book.put_deployment(f"mine-{number}", model="digits", version=number, min_replicas=2, max_replicas=2)
    book.put_endpoint("public", targets=[{"deployment": "mine-1"}])
    book.put_endpoint("public", targets=[{"deployment": "mine-2"}])
    assert book.targets("public") == (["mine-2"], ["mine-1"])
    book.settle("public")
    assert book.scale("mine-1") == (2, 2, None)


def test_a_failover_of_another_endpoint_stays_awake_until_it_is_none(book):
    """Only a ready Deployment can take over."""
    book.deploy(version=1, min_replicas=2)
    book.put_deployment("far", model="digits", version=3)
    book.put_endpoint("public", targets=[{"deployment": "far"}], failover=["digits-v1"])
    book.deploy(version=2)
    book.settle()
    assert book.scale("digits-v1") == (2, 2, None)
    book.put_endpoint("public", targets=[{"deployment": "far"}], failover=[])
    assert book.scale("digits-v1")[0] == 0
    book.put_endpoint("public", targets=[{"deployment": "far"}], failover=["digits-v1"])
    assert book.scale("digits-v1") == book.scale("far"), "it is woken"
    book.put_deployment("lazy", model="digits", version=1, min_replicas=0, scale_to_zero_after_s=30.0)
    book.put_endpoint("public", targets=[{"deployment": "far"}], failover=["lazy"])
    assert book.scale("lazy")[0] == 0, "a user declared it so"


def test_a_sleeping_target_without_a_share_is_woken_as_failover(book):
    book.deploy(version=1)
    book.deploy(version=2)
    book.settle()
    targets = [{"deployment": "digits-v2"}, {"deployment": "digits-v1", "weight": 0}]
    book.put_endpoint("digits", targets=targets)
    assert book.scale("digits-v1")[0] == 0
    book.put_endpoint("digits", targets=targets, failover=["digits-v1"])
    assert book.scale("digits-v1") == book.scale("digits-v2")


def test_deployment_shared_with_another_endpoint_stays_awake(book):
    book.deploy(version=1)
    book.put_endpoint("other", targets=[{"deployment": "digits-v1"}])
    book.deploy(version=2)
    book.settle()
    assert book.scale("digits-v1")[0] == 1


def test_canary_is_replaced_as_a_whole(book):
    book.deploy(version=1, threads=7)
    book.put_deployment("canary", model="digits", version=2)
    book.put_endpoint(
        "digits",
        targets=[{"deployment": "digits-v1", "weight": 90}, {"deployment": "canary", "weight": 10}],
    )
    assert book.targets() == (["digits-v1", "canary"], [])
    book.deploy(version=3)
    assert book.targets() == (["digits-v3"], ["digits-v1", "canary"])
    assert book.now.deployment("digits-v3").spec.threads == 7, "inherits from the heaviest"


def test_settle_refuses_an_endpoint_that_has_changed(book):
    book.deploy(version=1)
    book.deploy(version=2)
    with pytest.raises(Conflict, match=r"Read the .* again"):
        rollover.settle(book.now, "digits", 99)


def test_two_models_under_one_endpoint(book):
    book.deploy(version=1)
    book.deploy("mnist", endpoint="digits")
    assert book.targets() == (["mnist-v1"], ["digits-v1"])


@pytest.mark.parametrize(
    ("order", "error", "match"),
    [
        (rollover.DeployRequest("absent"), NotFound, "The model 'absent' does not exist"),
        (rollover.DeployRequest("digits", 9), NotFound, "Its versions: 1, 2, 3"),
        (rollover.DeployRequest("digits", 1, {"treads": 1}), BadRequest, "no field 'treads'"),
        (rollover.DeployRequest("digits", 1, {"min_replicas": 3, "max_replicas": 2}), BadRequest, "above"),
        (rollover.DeployRequest("digits", 1, {"version": 2}), BadRequest, "differs from the version"),
        (rollover.DeployRequest("digits", 1, {}, "Bad Name"), BadRequest, "not a valid name of a Endpoint"),
    ],
)
def test_bad_deploy_requests(book, order, error, match):
    with pytest.raises(error, match=match):
        rollover.deploy(book.now, order)


def test_name_taken_by_another_model(book):
    book.put_deployment("digits-v1", model="mnist", version=1)
    with pytest.raises(Conflict, match="runs version 1 of model 'mnist'"):
        book.deploy(version=1)
    book.deploy(version=1, name="digits-one")
    assert book.targets() == (["digits-one"], [])


def test_model_name_too_long_for_its_deployments(book):
    model = "m" * 62
    book.now = replace(book.now, versions=frozenset({(model, 1)}))
    with pytest.raises(BadRequest, match="longer than 63"):
        book.deploy(model)


def test_a_schedule_and_a_forecast_go_with_the_traffic(book):
    """Only requests wake a sleeping Deployment; a Deployment that takes over also takes the scale over."""
    window = {"start": "0 8 * * *", "end": "0 18 * * *", "min_replicas": 2}
    scaling = {"schedule": [window], "forecast": "daily", "aggressiveness": "latency"}
    book.deploy(version=1, max_replicas=4, scaling=scaling)
    book.deploy(version=2)
    book.settle()
    old, new = (book.now.deployment(f"digits-v{n}").spec.scaling for n in (1, 2))
    assert (old.schedule, old.forecast, old.aggressiveness) == ([], "off", "latency")
    assert (len(new.schedule), new.forecast) == (1, "daily")
    book.deploy(version=2, scaling={"max_up_per_minute": 3, "forecast": None})
    book.deploy(version=1, scaling={"down_window_s": 90})
    back = book.now.deployment("digits-v1").spec.scaling
    kept = (len(back.schedule), back.forecast, back.max_up_per_minute, back.down_window_s)
    assert kept == (1, "off", 3, 90)
