"""``tidegate rollout``: options that contradict each other, and an endpoint without a rollout."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.unit


def test_waiting_without_a_rollout_says_how_to_start_one(plane: Any, tidegate: Any) -> None:
    plane.answers["GET /v1/endpoints/digits"] = {"name": "digits", "rollout": None}
    plane.answers["GET /v1/rollouts/digits"] = {"endpoint": "digits", "rollout": None}
    code, out, _ = tidegate("rollout", "digits", "--wait")
    assert code == 4
    assert "Start one: tidegate rollout digits --to VERSION" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--to", "v2", "--pause"], "without --to"),
        (["--pause", "--resume"], "Use one of them"),
        (["--to", "v2", "--ab", "--rate", "20"], "--ab needs --to VERSION, and accepts only"),
        (["--to", "v2", "--shadow", "--direction", "down"], "--shadow has no steps"),
    ],
)
def test_options_that_contradict_each_other_change_nothing(
    plane: Any, tidegate: Any, options: list[str], told: str
) -> None:
    code, _, err = tidegate("rollout", "digits", *options)
    assert code == 2
    assert told in " ".join(err.split())
    assert plane.seen == []
