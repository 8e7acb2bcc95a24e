"""``up --with-monitoring``: what it does on a running and on a stopped stack."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tidegate.cli import monitoring
from tidegate.cli.own_stack import StackFailed
from tidegate.kernel.settings.base import Settings
from tidegate.stack.processes import Process
from tidegate.stack.record import ChildRecord, StackRecord

pytestmark = pytest.mark.unit

RUNNING = StackRecord("running", Process(1, 1), (ChildRecord("gateway", ports=(8000,)),))
MONITORED = StackRecord("running", Process(1, 1), (ChildRecord("prometheus", ports=(8090,)),))


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The installer's exit code, and the command that it was called with."""
    seen: dict[str, Any] = {"code": 0, "command": None}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen["command"] = command
        return subprocess.CompletedProcess(command, seen["code"])

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_a_running_stack_is_left_as_it_is(installer: dict[str, Any]):
    settings = Settings()
    assert monitoring.enabled(settings, MONITORED) is settings
    with pytest.raises(StackFailed, match="`tidegate down` and then `tidegate up --with-monitoring`"):
        monitoring.enabled(settings, RUNNING)
    assert installer["command"] is None


def test_a_start_installs_prometheus_and_requires_it(installer: dict[str, Any]):
    assert monitoring.enabled(Settings(monitoring="off"), StackRecord()).monitoring == "on"
    assert installer["command"][-1] == "deploy.bootstrap.monitoring"


def test_a_failed_installation_ends_the_start(installer: dict[str, Any]):
    installer["code"] = 1
    with pytest.raises(StackFailed, match="could not be installed"):
        monitoring.enabled(Settings(), StackRecord())


def test_the_address_is_that_of_the_record():
    assert monitoring.url(MONITORED) == "http://127.0.0.1:8090"
    assert monitoring.url(RUNNING) is None
