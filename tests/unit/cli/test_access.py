"""``tidegate keys``, ``audit`` and ``usage``, and the way through the gateway with a key."""

from __future__ import annotations

import json

import httpx
import pytest

from tidegate.cli import api
from tidegate.cli import exit_codes as exits
from tidegate.cli.exit_codes import UsageError
from tidegate.cli.history import day_of, differences
from tidegate.kernel.errors import Forbidden
from tidegate.kernel.settings.base import Settings

pytestmark = pytest.mark.unit

KEY = {
    "id": "ab12",
    "prefix": "tg_ab12",
    "name": "robot",
    "scopes": ["infer"],
    "endpoints": None,
    "expires_at": None,
    "state": "active",
    "rate": 5.0,
    "burst": None,
    "concurrency": None,
    "day": 100,
    "month": None,
}


def test_a_new_key_is_all_that_is_on_stdout(plane, tidegate):
    plane.answers["POST /v1/keys"] = KEY | {"key": "tg_ab12_secret"}
    arguments = ("--scope", "infer", "--endpoint", "digits", "--rate", "5", "--day", "100", "--expires", "2d")
    code, out, err = tidegate("keys", "create", "robot", *arguments)
    assert (code, out) == (0, "tg_ab12_secret\n")
    assert "not shown again" in err
    sent = {"name": "robot", "scopes": ["infer"], "endpoints": ["digits"], "rate": 5.0, "day": 100}
    assert json.loads(plane.bodies[0]) == sent | {"ttl_s": 172_800.0}


def test_limits_of_tokens(plane, tidegate):
    plane.answers["POST /v1/keys"] = KEY | {"key": "tg_ab12_secret"}
    limits = ("--tokens-per-minute", "1_000", "--tokens-per-day", "chat=50000", "--tokens-per-day", "9000")
    assert tidegate("keys", "create", "robot", *limits)[0] == 0
    assert json.loads(plane.bodies[0]) == {
        "name": "robot",
        "tokens_per_minute": 1000,
        "tokens_per_day": 9000,
        "endpoint_tokens": {"chat": {"tokens_per_day": 50_000}},
    }
    limited = KEY | {"tokens_per_minute": 1000, "endpoint_tokens": {"chat": {"tokens_per_day": 50_000}}}
    plane.answers["GET /v1/keys"] = {"items": [limited]}
    assert "tokens_per_minute=1000 tokens_per_day[chat]=50000" in tidegate("keys")[1]
    plane.answers["PATCH /v1/keys/ab12"] = KEY
    lift = ("--lift", "tokens-per-minute", "--lift", "endpoint-tokens")
    assert tidegate("keys", "update", "ab12", *lift)[0] == 0
    assert json.loads(plane.bodies[-1]) == {"tokens_per_minute": None, "endpoint_tokens": None}


@pytest.mark.parametrize("value", ["many", "=5", "chat=", "chat=-1", "1.5", ""])
def test_a_limit_of_tokens_that_is_no_number(plane, tidegate, value):
    code, _, err = tidegate("keys", "create", "robot", f"--tokens-per-minute={value}")
    assert code == exits.USAGE
    assert "expected a number of tokens" in err


FORBIDDEN = "the key 'robot' (tg_ab12) has the scope infer, but this needs publish: an admin adds it with ..."


def forbidden(request: httpx.Request) -> httpx.Response:
    """An answer to HEAD has no body, so no reason."""
    told = {"error": FORBIDDEN, "reason": "forbidden", "request_id": "r"}
    return httpx.Response(403) if request.method == "HEAD" else httpx.Response(403, json=told)


def test_deploy_with_a_key_that_may_only_infer_says_what_is_missing(plane):
    """Its first call is a HEAD, for the artifact."""
    for method in ("HEAD", "GET"):
        plane.answers[f"{method} /v1/artifacts/ab"] = forbidden
    with pytest.raises(Forbidden) as caught:
        api.control().registry.exists("/v1/artifacts/ab")
    assert caught.value.message == FORBIDDEN


def test_status_with_a_key_that_may_only_infer(plane, tidegate, monkeypatch):
    monkeypatch.setenv("TIDEGATE_API_KEY", "tg_ab12_secret")
    plane.answers["GET /health/ready"] = {"status": "ready", "problems": {}}
    for service in ("registry", "router", "autoscaler"):
        plane.answers[f"GET /api/{service}/health/ready"] = forbidden
    code, out, err = tidegate("status")
    assert code == exits.ERROR
    assert out.count("not allowed with this key") == 3
    assert "not ready" not in out
    assert err.count(FORBIDDEN) == 1
    assert json.loads(tidegate("status", "--json")[1])["problems"] == [FORBIDDEN]


def test_the_list(plane, tidegate):
    plane.answers["GET /v1/keys"] = {"items": [KEY]}
    code, out, _ = tidegate("keys")
    assert code == 0
    assert "tg_ab12  robot  infer   all        rate=5 day=100  active" in out
    code, out, _ = tidegate("keys", "--json")
    assert json.loads(out) == {"items": [KEY]}


def test_a_key_is_meant_by_id_prefix_or_name(plane, tidegate):
    other = KEY | {"id": "cd34", "name": "twin"}
    plane.answers["GET /v1/keys"] = {"items": [KEY, other, other | {"id": "ef56"}]}
    for id_ in ("ab12", "cd34"):
        plane.answers[f"DELETE /v1/keys/{id_}"] = KEY | {"state": "revoked"}
    for name in ("ab12", "tg_ab12", "robot"):
        code, out, _ = tidegate("keys", "revoke", name, "--yes")
        assert (code, out) == (0, "tg_ab12 (robot) is revoked\n")
    code, _, err = tidegate("keys", "revoke", "twin", "--yes")
    assert code == exits.USAGE
    assert "cd34, ef56" in err
    assert tidegate("keys", "revoke", "none", "--yes")[0] == exits.NOT_FOUND
    code, _, err = tidegate("keys", "revoke", "robot")
    assert (code, "repeat the command with --yes" in err) == (exits.USAGE, True)


def test_change_and_rotate(plane, tidegate):
    plane.answers["GET /v1/keys"] = {"items": [KEY]}
    plane.answers["PATCH /v1/keys/ab12"] = KEY
    plane.answers["POST /v1/keys/ab12/rotate"] = KEY | {"key": "tg_ab12_new"}
    assert tidegate("keys", "change", "robot", "--rate", "9", "--lift", "day", "--lift", "expires")[0] == 0
    assert json.loads(plane.bodies[-1]) == {"rate": 9.0, "day": None, "expires_at": None}
    assert tidegate("keys", "change", "robot")[0] == exits.USAGE
    assert tidegate("keys", "change", "robot", "--lift", "color")[0] == exits.USAGE
    code, out, _ = tidegate("keys", "rotate", "robot", "--grace", "1h")
    assert (code, out, json.loads(plane.bodies[-1])) == (0, "tg_ab12_new\n", {"grace_s": 3600.0})


def test_the_audit_log(plane, tidegate):
    entry = {
        "id": 1,
        "at": "2026-01-02T03:04:05+00:00",
        "principal_name": "olga",
        "origin": "192.0.2.1",
        "action": "updated",
        "kind": "deployment",
        "name": "digits-v1",
        "before": {"max_replicas": 1, "model": "digits"},
        "after": {"max_replicas": 3, "model": "digits"},
    }
    plane.answers["GET /v1/audit"] = {"items": [entry], "next": None}
    code, out, _ = tidegate("audit", "--kind", "deployment")
    assert code == 0
    assert "olga  192.0.2.1  updated  deployment digits-v1  max_replicas: 1 -> 3" in out
    assert differences(None, {"a": 1}) == ""
    assert differences({"a": "x" * 50}, {"a": None}) == f"a: {'x' * 37}... -> -"


def test_usage(plane, tidegate):
    row = {
        "principal": "ab12",
        "principal_name": "robot",
        "endpoint": "digits",
        "requests": 7,
        "failed": 1,
        "compute_us": 2_500_000,
        "received_bytes": 1000,
        "sent_bytes": 20,
        "tokens_in": 0,
        "tokens_out": 0,
    }
    plane.answers["GET /v1/usage"] = {"items": [row]}
    code, out, _ = tidegate("usage", "--since", "2026-01-01")
    assert code == 0
    assert "robot      digits    7         1       2.5 s    1 kB      20 B  -          -" in out
    plane.answers["GET /v1/usage.csv"] = lambda request: httpx.Response(
        200, text=f"day,{request.url.params['since']}\r\n"
    )
    code, out, _ = tidegate("usage", "--since", "2026-01-01", "--csv")
    assert (code, out) == (0, "day,2026-01-01\r\n")


def test_days():
    assert day_of("2026-01-31") == "2026-01-31"
    assert len(day_of("7d")) == 10
    for wrong in ("5h", "yesterday"):
        with pytest.raises(UsageError):
            day_of(wrong)


def test_with_a_key_everything_goes_through_the_gateway(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = Settings(gateway_url="http://tide.example/", api_key="tg_a_b", service_token="t")
    plane = api.Control(settings)
    assert plane.registry.url == "http://tide.example/api/registry"
    assert plane.gateway.url == "http://tide.example"
    assert {service._token for service in (plane.registry, plane.router, plane.gateway)} == {"tg_a_b"}
    alone = api.Control(Settings(registry_url="http://r", service_token="t"))
    assert (alone.registry.url, alone.registry._token, alone.gateway._token) == ("http://r", "t", "t")
