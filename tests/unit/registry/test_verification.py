"""Which versions may serve: pending and rejected ones may not, on none of the ways to traffic."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from services.registry.domain import edits, rollover, traffic_split, verification
from services.registry.domain.desired_state import RegistrySnapshot
from tests.unit.registry.conftest import Book
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.verification import (
    CapacityCard,
    Verification,
    VerificationOptions,
    VerificationResult,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
REJECTED = Verification(state="rejected", message="No module named 'lightgbm'", round=1)
PENDING = Verification(state="pending", round=1)


def with_state(book: Book, number: int, found: Verification) -> RegistrySnapshot:
    book.now = replace(book.now, refused={**book.now.refused, ("digits", number): found})
    return book.now


def deploy(now: RegistrySnapshot, version: int, **options):
    return rollover.deploy(now, rollover.DeployRequest("digits", version, options)).changes


def test_a_deploy_of_a_rejected_version_is_refused_with_the_models_message_and_the_next_command(book):
    book.deploy(version=1)
    now = with_state(book, 2, REJECTED)
    with pytest.raises(Conflict) as refused:
        verification.check(now, deploy(now, 2))
    assert refused.value.reason == "not_verified"
    for words in ("No module named 'lightgbm'", "tidegate verify digits --version 2", "--force"):
        assert words in refused.value.message


def test_a_deploy_of_a_pending_version_is_refused_until_it_is_verified(book):
    now = with_state(book, 1, PENDING)
    with pytest.raises(Conflict, match="is not verified yet"):
        verification.check(now, deploy(now, 1))
    book.now = replace(book.now, refused={})
    verification.check(book.now, deploy(book.now, 1))


def test_a_forced_deployment_may_run_it_and_its_successor_may_not(book):
    now = with_state(book, 1, REJECTED)
    forced = deploy(now, 1, unverified=True)
    verification.check(now, forced)
    book.carry_out(forced)
    now = with_state(book, 2, REJECTED)
    with pytest.raises(Conflict):
        verification.check(now, deploy(now, 2))


def test_force_also_counts_for_a_deployment_that_exists(book):
    book.deploy(version=1)
    book.deploy(version=2)
    book.settle()
    now = with_state(book, 1, REJECTED)
    with pytest.raises(Conflict):
        verification.check(now, deploy(now, 1))
    verification.check(now, deploy(now, 1, unverified=True))


def test_no_way_to_traffic_takes_a_version_that_was_rejected_later(book):
    book.deploy(version=1)
    book.put_deployment("other", model="digits", version=2)
    now = with_state(book, 2, REJECTED)
    targets = [{"deployment": "digits-v1", "weight": 90}, {"deployment": "other", "weight": 10}]
    ways = (
        lambda: edits.put_endpoint(now, "digits", {"targets": targets}),
        lambda: edits.put_endpoint(now, "new", {"targets": [{"deployment": "other"}]}),
        lambda: edits.put_deployment(now, "third", {"model": "digits", "version": 2}),
        lambda: edits.apply(now, [{"name": "fourth", "model": "digits", "version": 2}], [])[0],
        lambda: traffic_split.split(
            now, "digits", [now.endpoint("digits").spec.targets[0].model_copy(update={"deployment": "other"})]
        ),
    )
    for way in ways:
        with pytest.raises(Conflict, match="was rejected"):
            verification.check(now, way())


def test_what_serves_already_is_not_stopped(book):
    book.deploy(version=1)
    now = with_state(book, 1, REJECTED)
    verification.check(now, edits.patch_deployment(now, "digits-v1", {"max_replicas": 3}))
    verification.check(now, edits.put_endpoint(now, "digits", {"targets": [{"deployment": "digits-v1"}],
                                                               "default_timeout_ms": 5}))  # fmt: skip
    book.deploy(version=2)
    verification.check(book.now, rollover.settle(book.now, "digits", None))


def test_the_scratch_replica_runs_like_the_one_that_serves_with_the_publishers_options(book):
    book.deploy(version=1, env={"A": "1"}, resources={"memory_mb": 512}, min_replicas=3, max_replicas=3)
    given = VerificationOptions(deployment={"threads": 2, "env": {"B": "2"}, "min_replicas": 9})
    spec = verification.scratch_spec(book.now, "digits", 2, given)
    assert (spec.version, spec.threads, spec.resources.memory_mb) == (2, 2, 512)
    assert spec.env == {"A": "1", "B": "2"}
    assert spec.min_replicas == 1, "its scale is no option of a scratch replica"
    with pytest.raises(BadRequest):
        verification.scratch_spec(book.now, "digits", 2, VerificationOptions(deployment={"threads": 0}))


def test_language_models_and_upstreams_are_skipped_with_a_reason():
    for format_ in ("llm", "oip"):
        found = verification.at_registration(format_, NOW, enabled=True)
        assert found.state == "skipped"
        assert found.message
        assert not found.refused
    assert verification.at_registration("onnx", NOW, enabled=True).state == "pending"
    assert verification.at_registration("onnx", NOW, enabled=False) == Verification()


def test_only_the_result_of_the_present_round_counts_and_only_once():
    card = CapacityCard(requests_per_s=10.0, measured_at=NOW)
    good = VerificationResult(round=2, state="verified", card=card)
    assert verification.settled(PENDING, good, NOW) is None
    second = PENDING.model_copy(update={"round": 2, "card": card})
    found = verification.settled(second, good, NOW)
    assert found is not None
    assert (found.state, found.card) == ("verified", card)
    assert verification.settled(found, VerificationResult(round=2, state="rejected"), NOW) is None
    bad = verification.settled(second, VerificationResult(round=2, state="rejected", message="x"), NOW)
    assert bad is not None
    assert bad.card == card, "the capacity of the last good verification is kept"


def test_a_shadow_needs_a_verified_version(book):
    book.deploy(version=1)
    book.put_deployment("shade", model="digits", version=2)
    now = with_state(book, 2, REJECTED)
    spec = now.endpoint("digits").spec
    fields = spec.model_dump(mode="json") | {"shadow": {"id": "s", "deployment": "shade"}}
    fields.pop("name")
    with pytest.raises(Conflict, match="was rejected"):
        verification.check(now, edits.put_endpoint(now, "digits", fields))
