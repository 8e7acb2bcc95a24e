"""When a deployment counts as ready, as failed, or as still on its way."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.health import deployment_row, shares
from tidegate.cli.manage import documents
from tidegate.cli.publish import judge

STILL: dict[str, Any] = {"previous": []}
MOVING: dict[str, Any] = {"previous": [{"deployment": "a-v1", "weight": 100}]}


def status(ready: int, **conditions: tuple[bool, str, str]) -> dict[str, Any]:
    return {
        "deployment": "a-v2",
        "ready": ready,
        "desired": 1,
        "queue": None,
        "arrival_rate": None,
        "conditions": [
            {"type": kind, "ok": ok, "reason": reason, "message": message, "at": 50.0}
            for kind, (ok, reason, message) in conditions.items()
        ],
    }


FAILED = status(0, Ready=(False, "NoReplica", "none"), Loaded=(False, "LoadFailed", "bad model"))
LAUNCH = status(0, Ready=(False, "NoReplica", "none"), Loaded=(False, "LaunchFailed", "no python"))
ASLEEP = status(0, Ready=(True, "Asleep", ""))
FULL = status(0, Ready=(True, "Asleep", ""), Placeable=(False, "HostFull", "the host is full"))
CORDONED = status(0, Ready=(True, "Asleep", ""), Placeable=(False, "Cordoned", "cordoned"))
NO_HOST = status(0, Ready=(False, "NoReplica", "none"), Placeable=(False, "Cordoned", "cordoned"))
READY = status(1, Ready=(True, "Ready", ""))
# The replica that serves has the options of before.
OTHER_OPTIONS = status(1, Ready=(True, "Ready", ""), Current=(False, "RollingOut", "1 replica still runs"))
NO_GPU = status(
    1,
    Ready=(True, "Ready", ""),
    Loaded=(False, "LaunchFailed", "no GPU"),
    Current=(False, "RollingOut", "1 replica still runs"),
)


@pytest.mark.parametrize(
    ("found", "endpoint", "state", "text"),
    [
        (None, STILL, "waiting", "not seen the deployment yet"),
        (FAILED, STILL, "failed", "bad model"),
        (FULL, STILL, "starting", "the host is full"),
        (CORDONED, STILL, "ready", "asleep; the first request starts it"),
        (NO_HOST, STILL, "starting", "cordoned"),
        (FULL, MOVING, "starting", "the host is full"),
        (LAUNCH, STILL, "starting", "no python"),
        (ASLEEP, MOVING, "starting", "it gets traffic when"),
        (ASLEEP, STILL, "ready", "asleep"),
        (READY, MOVING, "starting", "traffic moves to it now"),
        (READY, STILL, "ready", "1 ready"),
        ({**READY, "revision": 3}, STILL, "ready", "1 ready"),
        ({**READY, "revision": 2}, STILL, "waiting", "not seen the deployment yet"),
        (OTHER_OPTIONS, STILL, "starting", "1 replica still runs"),
        (NO_GPU, STILL, "starting", "no GPU"),
        (status(0, Ready=(False, "Starting", "0 of 1 ready")), STILL, "starting", "0 of 1 ready"),
        (status(0), STILL, "starting", "no replica yet"),
    ],
)
def test_judge(found: Any, endpoint: dict[str, Any], state: str, text: str) -> None:
    look = judge(3, found, endpoint, lambda at: at >= 50)
    assert look.state == state
    assert text in look.text


def test_an_old_failure_is_no_news() -> None:
    assert judge(3, FAILED, STILL, lambda at: at > 50).state == "starting"


@pytest.mark.parametrize(
    ("found", "state"), [(FAILED, "failed"), (ASLEEP, "asleep"), (READY, "ready"), (status(0), "ready")]
)
def test_rows_of_status(found: dict[str, Any], state: str) -> None:
    assert deployment_row(found, "a 2")[2] == state


def test_shares() -> None:
    one = [{"deployment": "a", "weight": 5}]
    assert shares(one) == "a"
    assert shares([*one, {"deployment": "b", "weight": 15}]) == "a 25%, b 75%"
    assert shares([]) == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no document"),
        ("- a", "document 1: needs `kind: Deployment`"),
        ("kind: Endpoint\n---\nkind: Pod", "document 2: .* has 'Pod'"),
        ("a: [", "is not YAML"),
    ],
)
def test_files_that_cannot_be_applied(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        documents(text, "f.yaml")
