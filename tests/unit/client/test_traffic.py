"""Rollouts over both clients, against a gateway that answers from memory."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from tests.unit.client.test_client import make  # noqa: F401
from tidegate.kernel import errors


class Plane:
    """The gateway's control plane: one endpoint, whose canary is promoted after some readings."""

    def __init__(self, readings: int = 0, id: str = "r1") -> None:
        self.readings, self.id = readings, id
        self.sent: list[tuple[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        if request.method == "POST":
            self.sent.append((path, orjson.loads(request.content)))
            return httpx.Response(200, json={"name": "digits"})
        if path == "/api/router/v1/rollouts/digits":
            return httpx.Response(200, json={"rollout": {"id": self.id}, "evidence": {"errors": {}}})
        self.readings -= 1
        phase = "running" if self.readings >= 0 else "promoted"
        return httpx.Response(200, json={"rollout": {"id": "r1", "phase": phase, "reason": "because"}})


def test_a_canary_is_started_and_changed(make: Any) -> None:  # noqa: F811
    plane = Plane()
    client = make(plane)
    client.start_rollout("digits", 2, steps=[5, 100], metric="score")
    client.start_rollout("digits", "digits-v2", swap=True)
    for call in (client.promote, client.pause_rollout, client.resume_rollout, client.rollback):
        call("a/b")
    client.rollback("digits", 1)
    assert plane.sent == [
        (
            "/api/registry/v1/endpoints/digits/rollout",
            {"version": 2, "options": {"steps": [5, 100], "metric": "score"}},
        ),
        (
            "/api/registry/v1/endpoints/digits/rollout",
            {"deployment": "digits-v2", "options": {}, "swap": True},
        ),
        ("/api/registry/v1/endpoints/a%2Fb/rollout/promote", {}),
        ("/api/registry/v1/endpoints/a%2Fb/rollout/pause", {}),
        ("/api/registry/v1/endpoints/a%2Fb/rollout/resume", {}),
        ("/api/registry/v1/endpoints/a%2Fb/rollback", {}),
        ("/api/registry/v1/endpoints/digits/rollback", {"version": 1}),
    ]


def test_a_rollout_has_the_evidence_of_its_router(make: Any) -> None:  # noqa: F811
    assert make(Plane()).rollout("digits")["evidence"] == {"errors": {}}
    older = make(Plane(id="r0")).rollout("digits")
    assert (older["rollout"]["phase"], "evidence" in older) == ("promoted", False)


def test_the_end_of_a_rollout(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tidegate.client.traffic.POLL_S", 0.0)
    assert make(Plane(readings=3)).wait_rollout("digits", 60)["rollout"]["phase"] == "promoted"
    with pytest.raises(errors.DeadlinePassed, match="has not ended after 0 s: because"):
        make(Plane(readings=9)).wait_rollout("digits", 0)


class ShadowPlane:
    """The gateway's control plane with a shadow. ``known``: the id of the shadow that the router knows."""

    def __init__(self, known: str | None = "s1") -> None:
        self.known = known
        self.sent: list[tuple[str, str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        if request.method != "GET":
            self.sent.append((request.method, path, orjson.loads(request.content)))
            return httpx.Response(200, json={"name": "digits"})
        if path == "/api/router/v1/shadows/digits":
            shadow = {"id": self.known} if self.known else None
            report = {"verdict": "agrees"}
            return httpx.Response(200, json={"shadow": shadow, "problem": "", "report": report})
        return httpx.Response(200, json={"shadow": {"id": "s1", "deployment": "digits-v2"}})


def test_a_shadow_is_started_shown_and_stopped(make: Any) -> None:  # noqa: F811
    plane = ShadowPlane()
    client = make(plane)
    client.start_shadow("digits", 2, rate=20)
    client.start_shadow("digits", "other", wake=True)
    client.stop_shadow("digits")
    path = "/api/registry/v1/endpoints/digits/shadow"
    assert plane.sent == [
        ("PUT", path, {"version": 2, "rate": 20}),
        ("PUT", path, {"deployment": "other", "wake": True}),
        ("DELETE", path, {}),
    ]
    found = client.shadow("digits")
    assert (found["shadow"]["deployment"], found["report"]) == ("digits-v2", {"verdict": "agrees"})


@pytest.mark.parametrize("known", ["s0", None])
def test_the_report_of_an_earlier_shadow_is_not_shown(make: Any, known: str | None) -> None:  # noqa: F811
    assert make(ShadowPlane(known)).shadow("digits")["report"] is None


def test_an_experiment_is_started_read_and_ended(make: Any) -> None:  # noqa: F811
    sent: list[tuple[str, Any]] = []

    def plane(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if request.method == "POST":
            sent.append((path.removeprefix("/api/registry/v1/endpoints/"), orjson.loads(request.content)))
            return httpx.Response(200, json={"name": "digits"})
        if path.startswith("/api/registry"):
            return httpx.Response(200, json={"experiment": {"id": "x2"}})
        return httpx.Response(200, json={"experiment": {"id": "x1"}, "metrics": ["old"]})

    client = make(plane)
    client.start_experiment("digits", 2, "other", share=30)
    client.stop_experiment("digits")
    client.choose_winner("digits", "digits-v2")
    assert sent == [
        ("digits/experiment", {"versions": [2], "deployments": ["other"], "options": {"share": 30}}),
        ("digits/experiment/stop", {}),
        ("digits/experiment/winner", {"deployment": "digits-v2"}),
    ]
    found = client.experiment("digits")
    assert (found["experiment"], found["metrics"]) == ({"id": "x2"}, []), "the router knows an older one"
