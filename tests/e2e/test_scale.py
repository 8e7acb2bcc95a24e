"""To zero and back, up by hand, and away."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tests.conftest import Figure
from tests.e2e.conftest import Digits, Stack
from tidegate import Client

PHASES = {"launch", "fetch", "triton_start", "load", "warm_up"}


def wait_replicas(stack: Stack, deployment: str, count: int, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while True:
        found = stack.replicas(deployment)
        if len(found) == count and all(r["state"] == "ready" for r in found):
            return
        assert time.monotonic() < end, f"{deployment}: wanted {count} ready replicas, have {found}"
        time.sleep(0.2)


def test_to_zero_and_woken_by_a_request(stack: Stack, client: Client, digits: Digits, figure: Figure):
    stack.deploy(digits.model, "sleeper", "--min", "0", "--max", "1", "--scale-to-zero-after", "1")
    wait_replicas(stack, "sleeper-v1", 0)
    assert client.is_ready("sleeper"), "a model that wakes is ready for clients that ask first"

    began = time.monotonic()
    answer = client.infer("sleeper", {"image": digits.images[:1]}, timeout_s=60)
    took = time.monotonic() - began
    assert answer["label"][0] == digits.labels[0]

    report = stack.cli("cold-starts", "sleeper-v1")["items"][-1]
    assert report["phases_ms"].keys() == PHASES
    assert all(value >= 0 for value in report["phases_ms"].values())
    parts = ", ".join(f"{name} {value:.0f} ms" for name, value in report["phases_ms"].items())
    figure(f"cold start: the request took {took * 1e3:.0f} ms; {parts}")


def test_by_hand(stack: Stack, client: Client, deploy_python: Callable[..., str]):
    deploy_python("identity", "twins", "--min", "1", "--max", "3")
    stack.cli("scale", "twins", "2")
    wait_replicas(stack, "twins-v1", 2)
    for value in range(50):
        x = np.full((1, 16), value, np.float32)
        assert np.array_equal(client.infer("twins", {"x": x})["y"], x)
    stack.cli("scale", "twins", "--auto")
    stack.cli("delete", "twins", "--yes")
    wait_replicas(stack, "twins-v1", 0)
    assert "twins" not in [m["name"] for m in client.models()]
