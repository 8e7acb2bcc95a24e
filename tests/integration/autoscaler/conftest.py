"""Launchers whose workers are a small script: lock, a child of its own, drain on SIGTERM.

A yard is a place where they run, and knows how to look at and break what runs there: one of processes, one
of containers. The launchers' behaviour suite runs in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.autoscaler.domain.launcher import parse_replica
from tests.integration.autoscaler.container_yard import ContainerYard, missing
from tests.integration.autoscaler.process_yard import ProcessYard
from tidegate.kernel.protocol.models import Assignment, Deployment, Version

BORN = datetime(2024, 1, 1, tzinfo=UTC)


def assignment(replica: str, **given) -> Assignment:
    parsed = parse_replica(replica)
    assert parsed is not None
    name, _, generation = parsed
    wanted = {"name": name, "model": "digits", "version": 1, "revision": 1, "created_at": BORN}
    return Assignment(
        replica=replica,
        generation=generation,
        deployment=Deployment.model_validate({**wanted, **given}),
        version=Version(
            model="digits",
            number=1,
            format="onnx",
            artifact_sha256="0" * 64,
            artifact_size=1,
            filename="model.onnx",
            created_at=BORN,
        ),
        launched_at=time.time(),
    )


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[ProcessYard]:
    """Workers as processes."""
    found = ProcessYard(tmp_path)
    yield found
    found.clear()


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[ContainerYard]:
    """Workers as containers; skipped, with the reason, where no engine runs."""
    reason = missing()
    if reason:
        pytest.skip(f"no containers here: {reason}")
    found = ContainerYard(tmp_path)
    yield found
    found.clear()


@pytest.fixture
def proxied(containers: ContainerYard) -> Iterator[ContainerYard]:
    """Workers as containers of an engine behind the proxy, which must let everything pass that is needed."""
    with containers.behind_proxy():
        yield containers


@pytest.fixture(params=["processes", "containers", "proxied"])
def yard(request: pytest.FixtureRequest) -> ProcessYard | ContainerYard:
    """Each of them in turn."""
    found: ProcessYard | ContainerYard = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def assign() -> Callable[..., Assignment]:
    """Builds an assignment for a replica's name."""
    return assignment
