"""Bad input, unknown names, deadlines: clear answers in the protocol's shape, never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack


def post(stack: Stack, model: str, body: Any, **headers: str) -> httpx.Response:
    url = f"{stack.settings.gateway_url}/v2/models/{model}/infer"
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(url, headers=headers, timeout=120, **content)


def image(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 64], "data": [0] * 64} | changes]}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"{", 400, "not JSON"),
        ({}, 400, "Unable to parse 'inputs': it must be a list"),
        (image(name="img"), 400, "unexpected inference input 'img' for model 'digits': it takes ['image']"),
        (
            image(datatype="INT64"),
            400,
            "inference input 'image' data-type is 'INT64', but model 'digits' expects 'FP32'",
        ),
        (
            image(shape=[1, 63]),
            400,
            "unexpected shape for input 'image' for model 'digits'. Expected [-1,64], got [1,63].",
        ),
        (image(data=[0] * 63), 400, "needs 64 elements, got 63"),
        (image(data=["a"] * 64), 400, "data is not FP32"),
        (image(shape=[0, 64], data=[]), 400, "batch-size must be <= 64"),
        (
            image() | {"outputs": [{"name": "nope"}]},
            400,
            "unexpected inference output 'nope' for model 'digits'",
        ),
        (image() | {"parameters": {"sequence_id": -7}}, 400, "parameter 'sequence_id' must be from 0"),
    ],
)
def test_what_is_wrong_with_a_request(stack: Stack, served: str, body: Any, status: int, told: str):
    answer = post(stack, served, body)
    assert answer.status_code == status
    assert told in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_unknown_names(stack: Stack, served: str):
    assert post(stack, "nobody", image()).status_code == 404
    assert post(stack, f"{served}/versions/99", image()).status_code == 404


def test_request_id_is_carried(stack: Stack, served: str):
    answer = post(stack, served, image(), **{"X-Request-Id": "mine-1"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json().get("id") is None


def test_a_page_may_not_post(stack: Stack, served: str):
    assert post(stack, served, image(), Origin="http://evil.example").status_code == 403
    assert post(stack, served, image(), Host="evil.example").status_code == 403


def test_control_plane_needs_the_token(stack: Stack):
    for url in (stack.settings.registry_url, stack.settings.router_url, stack.settings.autoscaler_url):
        assert httpx.get(f"{url}/v1/deployments", timeout=PATIENCE_S).status_code == 401


def test_deadline(stack: Stack, deploy_python: Callable[..., str]):
    deploy_python("sleep", "slow", "--max-batch", "1")
    body = {"inputs": [{"name": "ms", "datatype": "FP32", "shape": [1, 1], "data": [700]}]}
    answer = post(stack, "slow", body, **{"X-Request-Timeout-Ms": "200"})
    assert answer.status_code == 504
    assert answer.json()["reason"] == "deadline_passed"
    assert post(stack, "slow", body, **{"X-Request-Timeout-Ms": "soon"}).status_code == 400


UNLUCKY = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError("no luck today")

    def execute(self, requests):
        return []
"""


def test_a_model_that_does_not_load_is_not_ready_and_every_call_says_why(stack: Stack, tmp_path: Path):
    """The first call waits while it is tried, with more time than that takes."""
    (tmp_path / "model.py").write_text(UNLUCKY)
    signature = REPO / "examples" / "python-model" / "identity" / "signature.json"
    options = ("--name", "unlucky", "--signature", str(signature), "--min", "1", "--max", "1")
    stack.cli("deploy", str(tmp_path / "model.py"), *options, "--no-wait")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [0] * 16}]}
    url = f"{stack.settings.gateway_url}/v2/models/unlucky"
    end = time.monotonic() + PATIENCE_S
    while httpx.get(url, timeout=PATIENCE_S).status_code == 404:
        assert time.monotonic() < end, "the gateway does not know it"
        time.sleep(0.1)
    answer = httpx.post(
        f"{url}/infer", json=body, headers={"X-Request-Timeout-Ms": "600000"}, timeout=PATIENCE_S
    )
    assert (answer.status_code, answer.json()["reason"]) == (503, "no_capacity")
    assert "no luck today" in answer.json()["error"]
    ready = httpx.get(f"{url}/ready", timeout=PATIENCE_S)
    assert (ready.status_code, ready.json()["ready"]) == (503, False)
    assert "no luck today" in ready.json()["error"]
    waited = stack.run("deploy", str(tmp_path / "model.py"), *options)
    assert waited.returncode == 4
    assert "Tidegate keeps trying. Stop it: tidegate delete unlucky" in waited.stderr
    assert stack.run("delete", "unlucky", "--yes").returncode == 0


def test_a_model_error_is_told_in_its_own_words(stack: Stack, deploy_python: Callable[..., str]):
    deploy_python("sleep", "slow", "--max-batch", "1")
    body = {"inputs": [{"name": "ms", "datatype": "FP32", "shape": [1, 1], "data": [-1]}]}
    answer = post(stack, "slow", body)
    assert answer.status_code == 500
    assert "ms must be at least 0" in answer.json()["error"]
