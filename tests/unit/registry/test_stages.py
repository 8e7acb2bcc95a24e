"""Stages of versions, without a database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.registry.domain import edits, rollover, stages
from services.registry.domain.model_policy import ModelPolicy, Stage, patched
from services.registry.domain.stages import Approval, StageFacts
from tidegate.kernel.errors import BadRequest, Conflict

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = ModelPolicy(
    stages=[
        Stage(name="staging", checks="accuracy > 0.9"),
        Stage(name="production", approvals=2, scope="operate", verified=True),
    ],
    serve_from="production",
)
STAGING, PRODUCTION = POLICY.stages
FACTS = StageFacts(
    stage=None, registered_by="ann", approvals=(), verification="pending", checks_met=True
)  # fmt: skip


def approved(*principals: str, stage: str = "production") -> list[Approval]:
    return [Approval(stage, each, each, NOW) for each in principals]


def test_what_is_missing_for_a_stage():
    assert stages.missing(POLICY, STAGING, FACTS) == []
    assert stages.missing(POLICY, STAGING, replace(FACTS, checks_met=False)) == [
        "the version does not match the stage's checks 'accuracy > 0.9'"
    ]
    assert stages.missing(POLICY, PRODUCTION, FACTS) == [
        "the version must be in the stage staging first",
        "the version must be verified, but it is pending",
        "the version has 0 of 2 approvals by other keys with the scope operate",
    ]
    almost = replace(FACTS, stage="staging", verification="verified")
    for given, count in (
        (approved("bob"), 1),
        (approved("bob", "ann"), 1),
        (approved("bob") + approved("eve", stage="staging"), 1),
        (approved("bob", "bob"), 1),
    ):
        (lack,) = stages.missing(POLICY, PRODUCTION, replace(almost, approvals=given))
        assert f"the version has {count} of 2" in lack
    assert stages.missing(POLICY, PRODUCTION, replace(almost, approvals=approved("bob", "eve"))) == []


def test_keys_of_one_owner_count_once():
    almost = replace(FACTS, stage="staging", verification="verified")

    def lacks(*approvals: tuple[str, str | None], registered_for: str | None = None) -> list[str]:
        given = [Approval("production", key, key, NOW, owner=owner) for key, owner in approvals]
        facts = replace(almost, approvals=given, registered_for=registered_for)
        return stages.missing(POLICY, PRODUCTION, facts)

    (lack,) = lacks(("key1", "bob"), ("key2", "Bob"))
    assert lack.startswith(
        "the version has 1 of 2 approvals by other keys with the scope operate (several keys of one owner"
    )
    assert lacks(("key1", "bob"), ("jwt:bob", None)) == [lack], "a token's subject is its owner"
    assert lacks(("key1", "ann"), ("key2", "bob"), registered_for="ann") == [lack]
    assert lacks(("key1", "bob"), ("key2", "eve"), registered_for="ann") == []
    assert lacks(("key1", None), ("key2", None), registered_for="ann") == []
    assert lacks(("bob", None), ("key2", "bob")) == [], "a key's id is not an owner's name"


def test_a_version_may_always_go_back():
    with pytest.raises(
        Conflict, match=r"cannot enter the stage production: .*; the version has 0 of 2"
    ) as error:
        stages.enter(POLICY, "digits", 3, "production", FACTS)
    assert error.value.reason == "stage_required"
    stages.enter(POLICY, "digits", 3, "staging", replace(FACTS, stage="production", checks_met=False))
    with pytest.raises(BadRequest, match="Its stages: staging, production"):
        stages.stage_of(POLICY, "digits", "prod")


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        (FACTS, "tidegate stage digits@3 --to staging"),
        (replace(FACTS, stage="staging"), "tidegate verify digits --version 3"),
        (
            replace(FACTS, stage="staging", verification="verified"),
            "tidegate approve digits@3 --stage production",
        ),
    ],
)
def test_the_error_names_the_command_for_what_a_version_lacks(facts: StageFacts, command: str):
    with pytest.raises(Conflict, match=f"{command}$"):
        stages.enter(POLICY, "digits", 3, "production", facts)


def test_a_version_that_does_not_match_the_checks_is_shown():
    with pytest.raises(Conflict, match=r"tidegate show digits@3$"):
        stages.enter(POLICY, "digits", 3, "staging", replace(FACTS, checks_met=False))


def test_only_versions_of_the_stage_get_a_deployment(book):
    book.now = replace(book.now, policies={"digits": POLICY}, staged={("digits", 1): "staging"})

    def check(version: int, model: str = "digits") -> None:
        request = rollover.DeployRequest(model, version)
        stages.check(book.now, rollover.deploy(book.now, request).changes)

    for number, words in ((1, "is in the stage staging"), (2, "is in no stage")):
        with pytest.raises(Conflict, match=f"{words}, and only versions in 'production' may serve"):
            check(number)
    book.now = replace(book.now, staged={("digits", 1): "production"})
    check(1)
    check(1, "mnist")
    book.deploy(version=1)
    book.now = replace(book.now, staged={})
    stages.check(book.now, edits.patch_deployment(book.now, "digits-v1", {"max_replicas": 3}))
    with pytest.raises(Conflict, match="may serve"):
        stages.check(book.now, edits.put_deployment(book.now, "own", {"model": "digits", "version": 2}))


def test_wrong_policies_are_refused():
    two = [{"name": "staging"}, {"name": "production"}]
    for patch, words in (
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"stages": [{"name": "none"}]}, "cannot be called"),
        ({"stages": [{"name": "Prod"}]}, "name"),
        ({"stages": two, "serve_from": "prod"}, "not one of the stages"),
        ({"stages": [{"name": "a", "checks": "onwer = x"}]}, "the name 'onwer' does not exist"),
        ({"stages": [{"name": "a", "approvals": 99}]}, "less than or equal to 20"),
    ):
        with pytest.raises(BadRequest, match=words):
            patched(ModelPolicy(), patch)
    assert patched(POLICY, {"stages": None, "serve_from": None}) == ModelPolicy()
    assert POLICY.guards(ModelPolicy())
    assert not POLICY.guards(patched(POLICY, {"retention": {"keep_last": 3}}))
