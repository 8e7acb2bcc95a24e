"""To zero and back, up by hand, and away; and what several replicas did, together."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import Digits, Stack
from tidegate import Client

PHASES = {"launch", "fetch", "triton_start", "load", "warm_up"}


def wait_replicas(stack: Stack, deployment: str, count: int, limit_s: float = PATIENCE_S) -> None:
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


async def test_statistics_add_up_over_replicas(
    stack: Stack, client: Client, deploy_python: Callable[..., str], until: Callable[..., Any]
):
    """Every request once, whichever replica answered it, also after one of them has gone."""
    deploy_python("identity", "pair", "--min", "2", "--max", "2")
    wait_replicas(stack, "pair-v1", 2)

    def counted() -> tuple[int, int, int]:
        (found,) = httpx.get(f"{stack.settings.gateway_url}/v2/models/pair/stats", timeout=PATIENCE_S).json()[
            "model_stats"
        ]
        success, infer = found["inference_stats"]["success"], found["inference_stats"]["compute_infer"]
        return success["count"], infer["count"], found["inference_count"]

    def ask(requests: int) -> None:
        for value in range(requests):
            x = np.full((2, 16), value, np.float32)
            assert np.array_equal(client.infer("pair", {"x": x})["y"], x)

    before = {address: answered(address) for address in workers(stack, "pair-v1")}
    begun = counted()
    ask(40)
    grown = {address: answered(address) - count for address, count in before.items()}
    assert len(grown) == 2
    assert sum(grown.values()) == 40
    assert all(grown.values()), "both had some, so neither's counts are the whole"
    wanted = (begun[0] + 40, begun[1] + 40, begun[2] + 80)
    await until(lambda: counted() == wanted, f"{wanted}: requests, requests, rows")

    stack.cli("scale", "pair", "1")
    wait_replicas(stack, "pair-v1", 1)
    assert counted() == wanted
    ask(10)
    wanted = (wanted[0] + 10, wanted[1] + 10, wanted[2] + 20)
    await until(lambda: counted() == wanted, f"{wanted}: requests, requests, rows")
    stack.cli("delete", "pair", "--yes")


def workers(stack: Stack, deployment: str) -> list[str]:
    """The addresses of a Deployment's workers, as Prometheus is told them."""
    found = stack.autoscaler("/prometheus/workers")
    return [
        address for each in found if each["labels"]["deployment"] == deployment for address in each["targets"]
    ]


def answered(address: str) -> float:
    """Requests that a worker has answered, as it tells itself."""
    families = text_string_to_metric_families(httpx.get(f"http://{address}/metrics", timeout=PATIENCE_S).text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "tidegate_worker_requests_total" and sample.labels["outcome"] == "ok"
    )
