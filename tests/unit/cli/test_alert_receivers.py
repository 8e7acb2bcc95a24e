"""``tidegate alerts add-receiver``: receivers of alerts, and of changes in the registry."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

pytestmark = pytest.mark.unit

PATH = "PUT /v1/alerts/receivers/ci"
URL = "https://ci.example.com/hook"


def test_a_receiver_of_changes(plane: Any, tidegate: Any) -> None:
    plane.answers[PATH] = {}
    code, out, _ = tidegate("alerts", "add-receiver", "ci", "--webhook", URL, "--changes", "version, alias")
    assert code == 0
    assert "ci receives changes in the registry. Try it: tidegate alerts test ci" in out
    body = {"kind": "webhook", "to": URL, "endpoint": "*", "severity": "warning"}
    assert orjson.loads(plane.bodies[-1]) == body | {"changes": ["version", "alias"]}
    assert tidegate("alerts", "add-receiver", "ci", "--webhook", URL, "--changes", "all")[0] == 0
    assert len(orjson.loads(plane.bodies[-1])["changes"]) == 5
    assert tidegate("alerts", "add-receiver", "ci", "--webhook", URL)[0] == 0
    assert orjson.loads(plane.bodies[-1]) == body, "an older router knows no `changes`"
    sent = len(plane.bodies)
    for wrong in ("keys", ",", "version,kyes"):
        code, _, err = tidegate("alerts", "add-receiver", "ci", "--webhook", URL, "--changes", wrong)
        assert code == 2
        assert "Write `all`, or some of version,alias,policy,deployment,endpoint" in err
    assert len(plane.bodies) == sent


def test_the_list_says_what_each_receiver_gets(plane: Any, tidegate: Any) -> None:
    shown = {"kind": "webhook", "to": "https://ci.example.com/...", "endpoint": "*"}
    plane.answers["GET /v1/alerts/receivers"] = {
        "items": [
            shown | {"name": "ci", "severity": "warning", "changes": ["version", "alias"]},
            shown | {"name": "ops", "severity": "warning", "changes": []},
            shown | {"name": "pager", "severity": "critical"},
        ]
    }
    _, out, _ = tidegate("alerts", "receivers")
    ci, ops, pager = out.splitlines()[1:]
    assert ci.endswith("changes: version, alias")
    assert ops.endswith("alerts: warning and worse")
    assert pager.endswith("alerts: critical")
