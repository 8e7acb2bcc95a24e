"""Shadows in the registry: start, stop and promote one, and what it never changes."""

from __future__ import annotations

import pytest

from services.registry.domain import edits, removal, rollouts, rollover, shadows, traffic_split
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import CanaryOptions, Shadow, Target

pytestmark = pytest.mark.unit


@pytest.fixture
def served(book):
    """An endpoint that serves version 2; version 1 sleeps."""
    book.deploy(version=1)
    book.settle()
    book.deploy(version=2)
    book.settle()
    return book


def shadow(book):
    return book.now.endpoint("digits").spec.shadow


def start(book, deployment="digits-v1", **options):
    return book.carry_out(
        shadows.start(book.now, "digits", Shadow(deployment=deployment, id="s1", **options))
    )


def test_a_shadow_changes_neither_targets_nor_a_sleeping_deployment(served):
    targets, asleep = served.targets(), served.scale("digits-v1")
    changes, name = shadows.version_changes(served.now, "digits", 1, wake=False)
    assert (changes, name) == ([], "digits-v1")
    start(served)
    assert shadow(served).deployment == "digits-v1"
    assert (served.targets(), served.scale("digits-v1")) == (targets, asleep)
    assert asleep[0] == 0


def test_wake_gives_it_the_scale_of_the_one_that_serves(served):
    changes, _ = shadows.version_changes(served.now, "digits", 1, wake=True)
    served.carry_out(changes)
    start(served, wake=True)
    assert served.scale("digits-v1") == served.scale("digits-v2")


def test_a_version_without_a_deployment_gets_one(served):
    changes, name = shadows.version_changes(served.now, "digits", 3, wake=False)
    served.carry_out(changes)
    start(served, name)
    assert served.scale("digits-v3") == served.scale("digits-v2")


def test_stopping_puts_it_to_sleep(served):
    changes, name = shadows.version_changes(served.now, "digits", 3, wake=False)
    served.carry_out(changes)
    start(served, name)
    assert shadows.stop(served.now, "digits", "another") == []
    served.carry_out(shadows.stop(served.now, "digits", "s1"))
    assert (shadow(served), served.scale(name)[0]) == (None, 0)
    assert shadows.stop(served.now, "digits") == []


def test_promotion_makes_it_the_target_without_a_gap(served):
    start(served)
    served.carry_out(shadows.promote(served.now, "digits"))
    assert served.targets() == (["digits-v1"], ["digits-v2"])
    assert (shadow(served), served.scale("digits-v1")[0]) == (None, 1)
    with pytest.raises(NotFound, match="no rollout and no shadow"):
        shadows.promote(served.now, "digits")


def test_a_deployment_with_a_share_is_no_shadow(served):
    with pytest.raises(BadRequest, match="gets traffic"):
        start(served, "digits-v2")
    with pytest.raises(NotFound, match="There is no Deployment"):
        start(served, "absent")
    spec = served.now.endpoint("digits").spec.model_dump()
    for name, told in (("digits-v2", "cannot also be the shadow"), ("absent", "does not exist")):
        with pytest.raises(BadRequest, match=told):
            edits.put_endpoint(served.now, "digits", {**spec, "shadow": {"deployment": name}})


def test_a_shadow_that_gets_traffic_ends(served):
    start(served)
    served.carry_out(traffic_split.split(served.now, "digits", [Target(deployment="digits-v1")]))
    assert shadow(served) is None
    served.settle()
    start(served, "digits-v2")
    options = CanaryOptions(steps=[5, 100])
    served.carry_out(rollouts.start(served.now, "digits", "digits-v2", options, "r1", 1.0))
    assert shadow(served) is None


def test_a_shadow_is_in_use(served):
    start(served)
    with pytest.raises(Conflict, match="in use by Endpoint"):
        edits.delete_deployment(served.now, "digits-v1")
    served.carry_out(removal.delete_model(served.now, "digits", cascade=True))
    assert not served.now.endpoints


def test_a_file_states_it(served):
    spec = served.now.endpoint("digits").spec.model_dump(exclude={"name", "previous", "rollout", "shadow"})
    stated = {**spec, "shadow": {"deployment": "digits-v1", "rate": 20}}
    served.put_endpoint("digits", **stated)
    assert (shadow(served).rate, shadow(served).id) == (20, "")
    start(served, rate=20)
    assert served.put_endpoint("digits", **stated) == [], "the id stays"
    served.put_endpoint("digits", **spec)
    assert shadow(served) is None


def test_a_deploy_of_the_shadow_ends_it(served):
    start(served)
    served.deploy(version=1)
    served.settle()
    assert shadow(served) is None
    assert rollover.without_own_shadow(served.now.endpoint("digits").spec).shadow is None
