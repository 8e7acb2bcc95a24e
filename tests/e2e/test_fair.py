"""Callers with keys of their own share a model, and an upstream is one target among others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack
from tests.e2e.test_access import make_key
from tidegate.stack.ports import free_ports

SLEEP = REPO / "examples" / "python-model" / "sleep"
TENSOR = {"name": "ms", "shape": [1, 1], "datatype": "FP32", "data": [60.0]}
FLOOD = 24


@pytest.fixture(scope="module")
def sleeping(stack: Stack) -> str:
    """A model with one call at a time: each takes 60 ms."""
    described = ("--signature", str(SLEEP / "signature.json"), "--max-batch", "1")
    stack.deploy(SLEEP / "model.py", "sleeping", *described, "--min", "1", "--max", "1")
    return "sleeping"


def ask(client: httpx.Client, model: str) -> httpx.Response:
    return client.post(f"/v2/models/{model}/infer", content=json.dumps({"inputs": [TENSOR]}))


class Caller:
    """The answers of a key, and their times in seconds."""

    def __init__(self, stack: Stack, name: str, *options: str) -> None:
        self._url = stack.settings.gateway_url
        self._key = make_key(stack, name, *options)["key"]
        self.times: list[float] = []
        self.refused = 0

    def send(self, model: str, until: Callable[[], bool]) -> None:
        """Send one request after the other until ``until`` is true."""
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=PATIENCE_S) as client:
            while not until():
                began = time.monotonic()
                if ask(client, model).status_code == 200:
                    self.times.append(time.monotonic() - began)
                else:
                    self.refused += 1

    @contextmanager
    def flooding(self, model: str) -> Iterator[None]:
        """Keep ``FLOOD`` requests in flight."""
        over = threading.Event()
        threads = [threading.Thread(target=self.send, args=(model, over.is_set)) for _ in range(FLOOD)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def test_a_flood_of_one_key_does_not_delay_another(stack: Stack, sleeping: str):
    flood, light = Caller(stack, "flood"), Caller(stack, "light")
    with flood.flooding(sleeping):
        flood_began = len(flood.times)
        light.send(sleeping, lambda: len(light.times) >= 5)  # the worker learns that two callers share it
        before = len(flood.times)
        light.send(sleeping, lambda: len(light.times) >= 25)
        answered = len(flood.times) - before
        assert before > flood_began
    # First come, first served would answer the whole flood before each of the 20 requests.
    assert light.refused == 0
    assert answered < 20 * FLOOD / 2


def test_weights_divide_a_busy_model(stack: Stack, sleeping: str):
    heavy, usual = Caller(stack, "heavy", "--weight", "3"), Caller(stack, "usual")
    with heavy.flooding(sleeping), usual.flooding(sleeping):
        usual.send(sleeping, lambda: len(usual.times) >= 12)
        before = len(heavy.times), len(usual.times)
        usual.send(sleeping, lambda: len(usual.times) >= before[1] + 30)
        got = len(heavy.times) - before[0], len(usual.times) - before[1]
    assert 2 < got[0] / got[1] < 4


def test_an_upstream_answers_and_its_failover_takes_over(stack: Stack, sleeping: str):
    """One upstream is the stack's own gateway, which has the same protocol. The other one does not answer."""
    options = ("--signature", str(SLEEP / "signature.json"), "--region", "eu", "--instances", "1")
    near = f"{stack.settings.gateway_url}/v2/models/{sleeping}"
    (port,) = free_ports(1)
    nothing = f"http://127.0.0.1:{port}/v2/models/{sleeping}"
    for name, address in (("near", near), ("gone", nothing)):
        stack.cli("deploy", "--upstream", address, "--name", name, "--wait", "--timeout", "120", *options)
    shown: dict[str, Any] = stack.cli("traffic", "gone", "--failover", f"{sleeping}-v1")
    assert shown["failover"] == [f"{sleeping}-v1"]
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as client:
        answer = ask(client, "near")
        assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, [60.0]), answer.text
        end = time.monotonic() + PATIENCE_S
        while ask(client, "gone").status_code != 200:  # the gateway learns the failover in its own time
            assert time.monotonic() < end
        stack.cli("traffic", "gone", "--failover", "none")
        while (refused := ask(client, "gone")).status_code == 200:
            assert time.monotonic() < end
    assert (refused.status_code, refused.json()["reason"]) == (503, "upstream_unavailable")


def test_reserved_replicas_serve_only_their_endpoint(stack: Stack, sleeping: str):
    reserve = f"{sleeping}-v1-for-{sleeping}"

    def completed(deployment: str) -> int:
        return sum(
            each.get("completed", 0) for each in stack.replicas(deployment) if each["state"] == "ready"
        )

    def wait(true: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, stack.autoscaler("/v1/replicas")
            time.sleep(0.1)

    stack.cli("traffic", sleeping, "--reserve", "1")
    wait(lambda: any(each["state"] == "ready" for each in stack.replicas(reserve)))
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=PATIENCE_S) as client:

        def answers() -> bool:
            assert ask(client, sleeping).status_code == 200
            return completed(reserve) > 0

        wait(answers)
    assert reserve in stack.run("status").stdout
    assert stack.cli("traffic", sleeping, "--reserve", "0")["reserved"] == 0
    wait(lambda: not stack.replicas(reserve))
