from __future__ import annotations

import pytest

from services.registry.domain import edits
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import Override


def test_put_replaces_all_fields(book):
    book.put_deployment("mine", model="digits", version=1, threads=4)
    book.put_deployment("mine", model="digits", version=1)
    assert book.now.deployment("mine").spec.threads == 1
    assert book.put_deployment("mine", model="digits", version=1) == []


def test_patch_changes_only_what_is_given(book):
    book.put_deployment("mine", model="digits", version=1, threads=4, env={"A": "1", "B": "2"})
    book.carry_out(edits.patch_deployment(book.now, "mine", {"max_queue": 7, "env": {"A": None}}))
    spec = book.now.deployment("mine").spec
    assert (spec.threads, spec.max_queue, spec.env) == (4, 7, {"B": "2"})


def test_version_of_a_deployment_never_changes(book):
    book.put_deployment("mine", model="digits", version=1)
    with pytest.raises(Conflict, match="cannot change"):
        book.put_deployment("mine", model="digits", version=2)
    with pytest.raises(Conflict, match="cannot change"):
        edits.patch_deployment(book.now, "mine", {"version": 2})


def test_override_is_set_once_and_removed(book):
    book.put_deployment("mine", model="digits", version=1)
    override = Override(replicas=3)
    book.carry_out(edits.set_override(book.now, "mine", override))
    assert edits.set_override(book.now, "mine", override) == []
    book.put_deployment("mine", model="digits", version=1, threads=2)
    assert book.now.deployment("mine").override == override, "a put leaves the operator's word"
    assert edits.set_override(book.now, "mine", None)


def test_deployment_in_use_is_kept(book):
    book.deploy(version=1)
    book.deploy(version=2)
    for name in ("digits-v1", "digits-v2"):
        with pytest.raises(Conflict, match="in use by Endpoint 'digits'"):
            edits.delete_deployment(book.now, name)
    book.settle()
    assert edits.delete_deployment(book.now, "digits-v1")
    with pytest.raises(NotFound):
        edits.delete_deployment(book.now, "absent")


def test_a_failover_is_kept(book):
    book.deploy(version=1)
    book.put_deployment("spare", model="digits", version=2)
    targets = [{"deployment": "digits-v1"}]
    book.put_endpoint("digits", targets=targets, failover=["spare"])
    with pytest.raises(Conflict, match=r"is the failover of Endpoint 'digits'\. .*tidegate traffic digits"):
        edits.delete_deployment(book.now, "spare")
    book.put_endpoint("digits", targets=targets, failover=[])
    assert edits.delete_deployment(book.now, "spare")


def test_reweighting_needs_no_previous_but_a_swap_does(book):
    for number in (1, 2, 3):
        book.put_deployment(f"d{number}", model="digits", version=number)
    book.put_endpoint("e", targets=[{"deployment": "d1"}])
    book.put_endpoint("e", targets=[{"deployment": "d1", "weight": 9}, {"deployment": "d2", "weight": 1}])
    assert book.targets("e") == (["d1", "d2"], [])
    book.put_endpoint("e", targets=[{"deployment": "d3"}])
    assert book.targets("e") == (["d3"], ["d1", "d2"])
    assert book.put_endpoint("e", targets=[{"deployment": "d3"}]) == [], "goes on with its roll-over"
    book.put_endpoint("e", targets=[{"deployment": "d3"}], previous=[])
    assert book.targets("e") == (["d3"], [])


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([], "targets"),
        ([{"deployment": "absent"}], "does not exist"),
        ([{"deployment": "d1"}, {"deployment": "d1"}], "twice"),
        ([{"deployment": "d1", "weight": 0}], "weights are 0"),
    ],
)
def test_endpoint_targets_are_checked(book, targets, match):
    book.put_deployment("d1", model="digits", version=1)
    with pytest.raises(BadRequest, match=match):
        book.put_endpoint("e", targets=targets)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model": "digits", "version": 9}, "It has 1, 2, 3"),
        ({"model": "absent", "version": 1}, "This model does not exist"),
        ({"model": "digits"}, "version is required"),
        ({"model": "digits", "version": 1, "max_replicas": 0, "min_replicas": 0}, "never serve"),
        ({"model": "digits", "version": 1, "threads": "many"}, "threads"),
        ({"model": "digits", "version": 1, "name": "other"}, "but the path has"),
    ],
)
def test_deployment_fields_are_checked(book, fields, match):
    with pytest.raises(BadRequest, match=match):
        book.put_deployment("mine", **{k: v for k, v in fields.items() if k != "name"}) if (
            "name" not in fields
        ) else edits.put_deployment(book.now, "mine", fields)


def test_apply_is_one_plan_and_idempotent(book):
    deployments = [
        {"name": "d1", "model": "digits", "version": 1},
        {"name": "d2", "model": "digits", "version": 2},
    ]
    endpoints = [{"name": "e", "targets": [{"deployment": "d1"}]}]
    changes, outcomes = edits.apply(book.now, deployments, endpoints)
    assert [outcome.action for outcome in outcomes] == ["created"] * 3
    book.carry_out(changes)
    changes, outcomes = edits.apply(book.now, deployments, endpoints)
    assert changes == []
    assert {outcome.action for outcome in outcomes} == {"unchanged"}
    deployments[0]["threads"] = 2
    _, outcomes = edits.apply(book.now, deployments, endpoints)
    assert [outcome.action for outcome in outcomes] == ["updated", "unchanged", "unchanged"]


def test_prune_deletes_what_a_file_does_not_name_unless_it_is_in_use(book):
    book.deploy(version=1)
    book.deploy(version=2)  # digits-v1 serves until digits-v2 is ready
    for name in ("mine", "spare", "alone"):
        book.put_deployment(name, model="digits", version=1)
    book.put_endpoint("other", targets=[{"deployment": "mine"}])
    book.put_endpoint("digits", targets=[{"deployment": "digits-v2"}], failover=["spare"])
    deployments, endpoints = [{"name": "digits-v2"}], [{"name": "digits"}]
    changes, outcomes = edits.prune(book.now, deployments, endpoints)
    assert [(each.kind, each.name, each.action) for each in outcomes] == [
        ("endpoint", "other", "deleted"),
        ("deployment", "alone", "deleted"),
        ("deployment", "digits-v1", "kept"),
        ("deployment", "mine", "deleted"),
        ("deployment", "spare", "kept"),
    ]
    assert {each.reason for each in outcomes if each.action == "kept"} == {"still used by Endpoint 'digits'"}
    book.carry_out(changes)
    assert sorted(book.now.deployments) == ["digits-v1", "digits-v2", "spare"]
    assert list(book.now.endpoints) == ["digits"]
    book.settle()
    changes, outcomes = edits.prune(book.now, deployments, endpoints)
    assert [(each.name, each.action) for each in outcomes] == [("digits-v1", "deleted"), ("spare", "kept")]


def test_prune_refuses_a_file_that_names_nothing(book):
    book.deploy(version=1)
    with pytest.raises(BadRequest, match="prune would delete all of them"):
        edits.prune(book.now, [], [])


def test_apply_refuses_duplicates_and_missing_names(book):
    one = {"name": "d1", "model": "digits", "version": 1}
    with pytest.raises(BadRequest, match=r"2 times\. Keep only one"):
        edits.apply(book.now, [one, one], [])
    with pytest.raises(BadRequest, match="needs a name"):
        edits.apply(book.now, [{"model": "digits", "version": 1}], [])
