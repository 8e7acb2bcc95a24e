"""Canaries that a file states: started once, and kept when the file is applied again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from services.registry.domain import edits, rollouts, rollover
from services.registry.domain.rollouts import Progress
from services.registry.domain.stated_rollouts import RolloutStart, put_endpoint
from tidegate.kernel.errors import BadRequest, NotFound

pytestmark = pytest.mark.unit

PUT = partial(put_endpoint, start=RolloutStart("r1", 100.0))
BASE: dict[str, Any] = {"targets": [{"deployment": "digits-v1"}]}
CANARY = {**BASE, "rollout": {"deployment": "digits-v2", "options": {"steps": [5, 100]}}}


@pytest.fixture
def two(book):
    """An endpoint that serves version 1, and a Deployment of version 2."""
    book.deploy(version=1)
    book.settle()
    book.carry_out(rollover.deploy(book.now, rollover.DeployRequest("digits", 2, traffic=False)).changes)
    return book


def spec(book):
    return book.now.endpoint("digits").spec


def apply(book, fields):
    return book.carry_out(edits.apply(book.now, [], [{"name": "digits", **fields}], PUT)[0])


def end(book, phase):
    book.carry_out(rollouts.advance(book.now, "digits", "r1", Progress(phase, "because"), 200.0))


def test_a_file_starts_a_canary_once(two):
    apply(two, CANARY)
    assert [t.weight for t in spec(two).targets] == [95_000, 5_000]
    assert (spec(two).rollout.id, spec(two).rollout.since) == ("r1", 100.0)
    assert apply(two, CANARY) == []


def test_the_file_of_the_baseline_does_not_end_a_canary(two):
    apply(two, CANARY)
    assert apply(two, BASE) == []
    apply(two, {**BASE, "default_timeout_ms": 5000})
    assert (spec(two).rollout.phase, spec(two).default_timeout_ms) == ("running", 5000)
    apply(two, {**BASE, "rollout": None})
    assert spec(two).rollout is None, "an explicit null ends it"
    assert [t.deployment for t in spec(two).targets] == ["digits-v1"]


@pytest.mark.parametrize(("phase", "serving"), [("promoted", "digits-v2"), ("rolled_back", "digits-v1")])
def test_an_ended_canary_is_not_started_again(two, phase, serving):
    apply(two, CANARY)
    end(two, phase)
    assert apply(two, CANARY) == []
    assert [t.deployment for t in spec(two).targets] == [serving]
    assert spec(two).rollout.phase == phase


def test_a_new_endpoint_may_begin_with_a_canary(two):
    two.carry_out(edits.apply(two.now, [], [{"name": "fresh", **CANARY}], PUT)[0])
    assert two.now.endpoint("fresh").spec.rollout.deployment == "digits-v2"


@pytest.mark.parametrize(
    ("rollout", "error", "words"),
    [
        ({"deployment": "absent"}, NotFound, "absent"),
        ({"deployment": "digits-v1"}, BadRequest, "gets traffic of Endpoint"),
        ({"deployment": "digits-v2", "step": [1]}, BadRequest, "no field 'step'"),
    ],
)
def test_a_canary_that_cannot_start(two, rollout, error, words):
    with pytest.raises(error, match=words):
        apply(two, {**BASE, "rollout": rollout})
