"""Who may call what, on a running stack: keys by the CLI, a web page, a remote CLI, audit and usage."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import REPO, Digits, Stack
from tidegate import Client
from tidegate.client.errors import Forbidden, TooMany, Unauthorized

PATIENCE_S = 120.0


def eventually(true: Callable[[], Any]) -> Any:
    """What ``true`` gives once it is true; a key reaches a gateway in its own time."""
    end = time.monotonic() + PATIENCE_S
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def make_key(stack: Stack, name: str, *options: str) -> dict[str, Any]:
    """A new key that the gateway knows."""
    made: dict[str, Any] = stack.cli("keys", "create", name, *options)
    url = f"{stack.settings.gateway_url}/v2/models"
    headers = {"Authorization": f"Bearer {made['key']}"}
    eventually(lambda: httpx.get(url, headers=headers).status_code != 401)
    return made


def remote(stack: Stack, key: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The CLI as on another machine: it knows the gateway's address and has a key, nothing else."""
    env = {k: v for k, v in stack.env.items() if not k.startswith("TIDEGATE_")}
    env |= {"TIDEGATE_GATEWAY_URL": stack.settings.gateway_url, "TIDEGATE_API_KEY": key}
    env |= {"TIDEGATE_STATE_DIR": "/nowhere", "TIDEGATE_RUNTIME_DIR": "/nowhere"}
    command = [sys.executable, "-m", "tidegate.cli", *args]
    return subprocess.run(
        command, env=env, cwd=REPO, text=True, capture_output=True, timeout=360, check=False
    )


def test_a_key_of_an_endpoint_with_a_limit(stack: Stack, served: str, digits: Digits):
    made = make_key(stack, "robot", "--endpoint", served, "--rate", "0.001", "--burst", "2")
    image = digits.images[:1]
    with Client(stack.settings.gateway_url, api_key=made["key"], retries=0) as client:
        for _ in range(2):
            assert client.infer(served, {"image": image})["label"][0] == digits.labels[0]
        with pytest.raises(TooMany) as caught:
            client.infer(served, {"image": image})
        assert caught.value.reason == "rate_limited"
        assert 800 <= (caught.value.retry_after_s or 0) <= 1200
        with pytest.raises(Forbidden):
            client.infer("other", np.zeros((1, 1), np.float32))
    stack.cli("keys", "revoke", "robot", "--yes")

    def refused() -> bool:
        with Client(stack.settings.gateway_url, api_key=made["key"], retries=0) as client:
            try:
                client.infer(served, {"image": image})
            except Unauthorized:
                return True
            except TooMany:
                return False
            return False

    eventually(refused)


def test_a_web_page_cannot_publish(stack: Stack, served: str):
    url = f"{stack.settings.gateway_url}/api/registry/v1/deploy"
    posted = httpx.post(url, content=b'{"model": "digits"}', headers={"Content-Type": "text/plain"})
    assert posted.status_code == 401, "a form can post, but it has no token"
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        headers |= {"Authorization": f"Bearer {stack.settings.service_token}"}
        assert httpx.post(url, content=b"{}", headers=headers).status_code == 403
    for service in ("registry", "router", "autoscaler"):
        straight = getattr(stack.settings, f"{service}_url")
        assert httpx.get(f"{straight}/v1/deployments").status_code == 401
        key = make_key(stack, f"page-{service}", "--scope", "admin")["key"]
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{straight}/v1/deployments", headers=headers).status_code == 401, (
            "services take the service token alone"
        )
        assert httpx.get(url.replace("registry/v1/deploy", f"{service}/health/ready"), headers=headers)


def test_a_key_that_publishes_may_wait_for_what_it_deploys(stack: Stack, served: str, digits: Digits):
    key = make_key(stack, "petra", "--scope", "publish")["key"]
    for note in ("one", "two"):
        deployed = remote(stack, key, "deploy", str(digits.model), "--name", "petras", "--tag", f"n={note}")
        assert (deployed.returncode, "petras serves version 1" in deployed.stdout) == (0, True), (
            deployed.stderr
        )
    for command in ("status", "why petras", "deployments", "rollback petras --to 1", "delete petras --yes"):
        done = remote(stack, key, *command.split())
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    for command in (f"scale {served} 1", "infer petras --data [[1]]", "dead"):
        assert "but this needs" in remote(stack, key, *command.split()).stderr, command


def test_the_cli_from_afar_and_its_trace(stack: Stack, served: str, digits: Digits):
    made = make_key(stack, "olga", "--scope", "publish", "--scope", "infer", "--scope", "operate")
    key = made["key"]
    deployed = remote(
        stack, key, "deploy", str(digits.model), "--name", "far", "--wait", "--timeout", "300", "--json"
    )
    assert deployed.returncode == 0, deployed.stderr
    answered = remote(stack, key, "infer", "far", "--data", str(digits.images[:1].tolist()), "--json")
    assert answered.returncode == 0, answered.stderr
    assert remote(stack, key, "scale", "far", "1").returncode == 0
    refused = remote(stack, key, "keys")
    assert (refused.returncode, "but this needs admin: an admin adds it with" in refused.stderr) == (1, True)

    entries = stack.cli("audit", "--by", made["id"])["items"]
    changed = [(e["action"], e["kind"], e["name"]) for e in reversed(entries)]
    assert changed[:3] == [
        ("created", "version", "far/1"),
        ("created", "deployment", "far-v1"),
        ("created", "endpoint", "far"),
    ]
    assert ("updated", "deployment", "far-v1") in changed, "the autoscaler tells the registry who asked it"
    assert {e["principal_name"] for e in entries} == {"olga"}
    assert {e["origin"] for e in entries} == {"127.0.0.1"}

    def counted() -> Any:
        return stack.cli("usage", "--key", made["id"], "--by", "endpoint")["items"]

    (row,) = eventually(counted)
    assert (row["endpoint"], row["requests"], row["failed"]) == ("far", 1, 0)
    assert row["compute_us"] > 0
    csv = stack.run("usage", "--key", made["id"], "--by", "endpoint", "--csv").stdout
    assert csv.splitlines()[1].startswith("far,1,0,")
    assert stack.run("delete", "far", "--yes").returncode == 0


def test_jobs_are_their_callers_own(stack: Stack, served: str, digits: Digits):
    mine, other = (make_key(stack, name)["key"] for name in ("mine", "other"))
    with Client(stack.settings.gateway_url, api_key=mine) as client:
        job = client.submit(served, {"image": digits.images[:1]})
        assert job.result(timeout_s=60)["label"][0] == digits.labels[0]
    url = f"{stack.settings.gateway_url}/v1/jobs/{job.id}"
    for key, status in ((mine, 200), (other, 404)):
        assert httpx.get(url, headers={"Authorization": f"Bearer {key}"}).status_code == status
    assert httpx.get(url).status_code == 404, "nor is it anybody's"
    id_ = mine.split("_")[1]
    (row,) = eventually(lambda: stack.cli("usage", "--key", id_, "--by", "endpoint")["items"])
    assert row["endpoint"] == served
    eventually(lambda: stack.cli("usage", "--key", id_, "--by", "endpoint")["items"][0]["requests"] == 1)


def test_no_log_of_the_stack_has_a_secret(stack: Stack, served: str):
    made = make_key(stack, "logged", "--scope", "admin")
    url = f"{stack.settings.gateway_url}/api/registry/v1/keys"
    for secret in (made["key"], f"{made['key']}x", stack.settings.service_token):
        httpx.get(url, headers={"Authorization": f"Bearer {secret}"})
    rotated = stack.cli("keys", "rotate", "logged")["key"]
    logs = {path: path.read_text(errors="replace") for path in stack.settings.state_path.rglob("*.log*")}
    assert any("/api/registry/v1/keys" in text for text in logs.values()), "the logs are those that are meant"
    secrets = [stack.settings.service_token, *(key.split("_", 2)[2] for key in (made["key"], rotated))]
    secrets.append(stack.run("webhook-secret").stdout.split()[-1])
    for path, text in logs.items():
        assert not any(secret in text for secret in secrets), path


def test_costs_and_a_budget_of_a_key(stack: Stack, served: str, digits: Digits):
    """A caller's requests show up in the report under its key. A budget of almost nothing refuses it."""
    made = make_key(stack, "payer", "--endpoint", served)
    with Client(stack.settings.gateway_url, api_key=made["key"], retries=0) as client:
        for _ in range(20):
            client.infer(served, {"image": digits.images[:4]})

        def billed() -> dict[str, Any] | None:
            items = stack.cli("costs", served, "--by", "key")["items"]
            mine = [item for item in items if item["key"] == made["id"]]
            return mine[0] if mine and mine[0]["requests"] == 20 else None

        mine = eventually(billed)
        assert mine["rows"] == 80
        assert 0 < mine["direct"] < mine["cost"]
        report = stack.cli("costs", "--by", "endpoint")
        assert sum(item["cost"] for item in report["items"]) == pytest.approx(report["total"]["cost"])
        assert report["replica_seconds"] == pytest.approx(report["observed_seconds"], rel=0.05, abs=5)

        stack.cli("keys", "change", "payer", "--budget-per-day", "0.000000001")

        def refused() -> TooMany | None:
            try:
                client.infer(served, {"image": digits.images[:1]})
            except TooMany as error:
                return error
            return None

        error = eventually(refused)
        assert error.reason == "budget_exhausted"
        assert "--budget-per-day" in error.message
    stack.cli("keys", "revoke", "payer", "--yes")
