"""What callers can ask about their webhooks, on the whole stack as shipped."""

from __future__ import annotations

import time

import httpx

from tests.e2e.conftest import Digits, Stack

PATIENCE_S = 120.0


def test_the_secret_of_callers_without_a_key(stack: Stack) -> None:
    with httpx.Client(base_url=stack.settings.gateway_url) as client:
        told = client.get("/v1/webhooks/secret").json()
    assert told["principal"] == "anonymous"
    assert told["secret"].startswith("whsec_")
    assert stack.run("webhook-secret").stdout.strip() == told["secret"]


def test_a_private_receiver_is_refused_and_the_log_says_so(stack: Stack, served: str, digits: Digits) -> None:
    image = digits.images[:1]
    tensor = {"name": "image", "datatype": "FP32", "shape": list(image.shape), "data": image.ravel().tolist()}
    body = {"model": served, "inputs": [tensor], "webhook": "http://localhost:9/hook"}
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as client:
        accepted = client.post("/v1/jobs", json=body)
        assert accepted.status_code == 202, accepted.text
        job = accepted.json()["id"]
        done = client.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=60"}).json()
        assert done["status"] == "succeeded"
        end = time.monotonic() + PATIENCE_S
        while not (tries := client.get(f"/v1/jobs/{job}/deliveries").json())["items"]:
            assert time.monotonic() < end, "no try was made"
            time.sleep(0.1)
        assert client.get(f"/v1/jobs/{'0' * 32}/deliveries").status_code == 404
    first = tries["items"][0]
    assert (first["webhook_id"], first["attempt"], first["status"]) == (f"msg_{job}", 1, None)
    assert first["problem"] == "the address is not allowed: webhooks go to public addresses only"


def test_the_ledger_balances(stack: Stack, served: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while (done := stack.run("ledger")).returncode != 0:
        assert time.monotonic() < end, done.stdout + done.stderr
        time.sleep(0.5)
    assert "unaccounted  0" in done.stdout
