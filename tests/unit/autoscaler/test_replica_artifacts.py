"""Test which artifact the token of a replica may read."""

from __future__ import annotations

import pytest

from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.replica_artifacts import artifacts_of
from tidegate.kernel.protocol.models import DesiredState

pytestmark = pytest.mark.unit

WHEN = "2026-01-01T00:00:00Z"


def version(number: int) -> dict[str, object]:
    digest = str(number) * 64
    return {
        "model": "m", "number": number, "format": "onnx", "artifact_sha256": digest, "artifact_size": 1,
        "filename": "m.onnx", "created_at": WHEN,
    }  # fmt: skip


INTENTION = DesiredState.model_validate(
    {
        "revision": 1,
        "versions": [version(1), version(2)],
        "deployments": [
            {"name": "m-v2", "model": "m", "version": 2, "revision": 1, "created_at": WHEN},
            {"name": "lost", "model": "m", "version": 9, "revision": 1, "created_at": WHEN},
        ],
    }
)


def running(replica: str, deployment: str, *, alive: bool = True, worker: str = "") -> Running:
    return Running(replica, deployment, 0, 1, 0, alive, 0.0, worker=worker)


def test_a_replica_may_read_what_its_deployment_serves():
    assert artifacts_of([running("m-v2-0-1", "m-v2")], INTENTION) == {"m-v2-0-1": "2" * 64}


def test_one_from_the_warm_pool_shows_the_token_of_the_worker_that_it_was():
    found = artifacts_of([running("m-v2-0-1", "m-v2", worker="warm-cpu--0-3")], INTENTION)
    assert found == {"warm-cpu--0-3": "2" * 64}


def test_the_dead_and_those_that_are_not_wanted_any_more_read_nothing():
    gone = [
        running("m-v2-0-1", "m-v2", alive=False),
        running("m-v1-0-1", "m-v1"),
        running("lost-0-1", "lost"),
    ]
    assert artifacts_of(gone, INTENTION) == {}
    assert artifacts_of([running("m-v2-0-1", "m-v2")], None) == {}
