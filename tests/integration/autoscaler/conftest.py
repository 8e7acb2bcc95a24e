"""Launchers whose workers are a small script, with a lock, a child process, and drain on SIGTERM.

A harness runs a launcher, and can inspect and break its workers: one for processes, one for containers. The
behaviour suite of launchers runs with each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from services.autoscaler.domain.launcher import parse_replica
from tests.integration.autoscaler.container_harness import ContainerHarness, missing
from tests.integration.autoscaler.process_harness import ProcessHarness
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
def processes(tmp_path: Path) -> Iterator[ProcessHarness]:
    """Return a harness of workers as processes."""
    found = ProcessHarness(tmp_path)
    yield found
    found.clear()


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[ContainerHarness]:
    """Return a harness of workers as containers. Skip the test, with the reason, if no engine runs."""
    reason = missing()
    if reason:
        pytest.skip(f"no containers here: {reason}")
    found = ContainerHarness(tmp_path)
    yield found
    found.clear()


@pytest.fixture
def proxied(containers: ContainerHarness) -> Iterator[ContainerHarness]:
    """Return a harness of containers whose launcher calls the engine through the proxy."""
    with containers.behind_proxy():
        yield containers


@pytest.fixture(params=["processes", "containers", "proxied"])
def harness(request: pytest.FixtureRequest) -> ProcessHarness | ContainerHarness:
    """Return each harness in turn."""
    found: ProcessHarness | ContainerHarness = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def assign() -> Callable[..., Assignment]:
    """Return a function that builds an assignment for a replica's name."""
    return assignment
