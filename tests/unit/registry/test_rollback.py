"""Rollback to an earlier version of an endpoint."""

from __future__ import annotations

from typing import Any

import pytest

from services.registry.domain.desired_state import DropDeployment
from services.registry.domain.rollback import EndpointHistory, RollbackPlan, rollback
from tidegate.kernel.errors import Conflict, NotFound


def state(*targets: str | tuple[str, int], previous: tuple[str, ...] = ()) -> dict[str, Any]:
    pairs = [each if isinstance(each, tuple) else (each, 100) for each in targets]
    return {
        "name": "digits",
        "targets": [{"deployment": name, "weight": weight} for name, weight in pairs],
        "previous": [{"deployment": name, "weight": 100} for name in previous],
    }


def go_back(book: Any, version: int | None = None, *states: dict[str, Any], **deleted: Any) -> RollbackPlan:
    gone = {name.replace("_", "-"): fields for name, fields in deleted.items()}
    plan = rollback(book.now, "digits", version, EndpointHistory(states, gone))
    book.carry_out(plan.changes)
    return plan


@pytest.fixture
def third(book):
    """Version 3 serves, 1 has served, and 2 never became ready."""
    book.deploy(version=1, threads=4)
    book.settle()
    book.deploy(version=2, threads=2)
    book.deploy(version=3, min_replicas=2)
    book.settle()
    return book


HISTORY = (
    state("digits-v3"),
    state("digits-v3", previous=("digits-v1",)),
    state("digits-v2", previous=("digits-v1",)),
    state("digits-v1"),
)


def test_a_version_that_never_served_is_skipped(third):
    plan = go_back(third, None, *HISTORY)
    assert (plan.version, plan.deployment, plan.replaced, plan.remade) == (
        1,
        "digits-v1",
        ["digits-v3"],
        False,
    )
    assert third.targets() == (["digits-v1"], ["digits-v3"]), "what serves goes on until it is ready"
    assert third.scale("digits-v1")[:2] == (2, 2), "at today's scale"


def test_a_second_rollback_goes_further_back(third):
    third.deploy(version=2)
    third.settle()
    states = (state("digits-v2"), *HISTORY)
    assert go_back(third, None, *states).version == 1
    third.settle()
    with pytest.raises(Conflict, match=r"no older version to go back to. Registered versions: 1, 2, 3"):
        go_back(third, None, state("digits-v1"), *states)


def test_a_repeated_rollback_changes_nothing(third):
    go_back(third, None, *HISTORY)
    again = go_back(third, None, state("digits-v1", previous=("digits-v3",)), *HISTORY)
    assert (again.changes, again.version) == ([], 1)


def test_a_roll_out_in_progress_is_abandoned(book):
    book.deploy(version=1)
    book.deploy(version=2)
    plan = go_back(book, None, state("digits-v2", previous=("digits-v1",)), state("digits-v1"))
    assert (plan.version, plan.replaced) == (1, ["digits-v2"])
    assert book.targets() == (["digits-v1"], [])
    assert book.scale("digits-v2")[0] == 0


def test_a_canary_goes_back_to_what_had_all_traffic(book):
    book.deploy(version=1)
    book.put_deployment("canary", model="digits", version=2)
    canary = [{"deployment": "digits-v1", "weight": 10}, {"deployment": "canary", "weight": 90}]
    book.put_endpoint("digits", targets=canary)
    book.settle()
    plan = go_back(book, None, state(("digits-v1", 10), ("canary", 90)), state("digits-v1"))
    assert (plan.version, plan.replaced) == (1, ["canary"])
    assert book.targets()[0] == ["digits-v1"]


def test_without_a_log_the_next_lower_number_is_taken(third):
    assert go_back(third).version == 2


def test_a_deleted_deployment_is_created_again(third):
    was = third.now.deployment("digits-v1").spec.model_dump() | {"env": {"KEY": "(hidden)"}, "revision": 7}
    third.carry_out([DropDeployment("digits-v1")])
    third.now.deployment("digits-v3").spec.env["KEY"] = "today"
    plan = go_back(third, None, *HISTORY, digits_v1=was)
    spec = third.now.deployment("digits-v1").spec
    assert (plan.remade, spec.threads, spec.env) == (True, 4, {"KEY": "today"})
    assert third.scale("digits-v1")[:2] == (2, 2)
    assert third.targets() == (["digits-v1"], ["digits-v3"])


def test_a_named_version_needs_no_history(third):
    plan = go_back(third, 2)
    assert (plan.deployment, plan.remade, third.targets()[0]) == ("digits-v2", False, ["digits-v2"])
    third.settle()
    third.carry_out([DropDeployment("digits-v3")])
    assert go_back(third, 3).remade
    assert third.now.deployment("digits-v3").spec.threads == 2, "the options of what it takes over from"


def test_a_rollback_to_the_current_version_changes_nothing(third):
    plan = go_back(third, 3, *HISTORY)
    assert (plan.changes, plan.replaced) == ([], [])


def test_an_unregistered_version_is_refused(third):
    with pytest.raises(NotFound, match=r"has no version 9. Its versions: 1, 2, 3"):
        go_back(third, 9)
    with pytest.raises(NotFound, match="no Endpoint 'absent'"):
        rollback(third.now, "absent", None, EndpointHistory())
