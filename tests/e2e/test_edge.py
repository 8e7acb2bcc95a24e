"""A stack in the edge profile: an int8 model, the memory, and jobs that wait until the uplink is back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import Digits, Stack, running_stack
from tests.integration.worker.fault_proxy import FaultProxy, closed
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.e2e

SIGNATURE = {
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [64]}],
    "outputs": [
        {"name": "label", "datatype": "INT64", "shape": []},
        {"name": "probabilities", "datatype": "FP32", "shape": [10]},
    ],
    "max_batch_size": 64,
}


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack in the edge profile, whose webhooks are retried soon and may go to this machine."""
    fields: dict[str, float | str] = {
        "profile": "edge",
        "webhook_allow_private": "true",
        "webhook_first_retry_s": 0.5,
    }
    with running_stack(tmp_path_factory.mktemp("edge") / "state", **fields) as found:
        yield found


@pytest.fixture(scope="module")
def smaller(edge: Stack, digits: Digits) -> str:
    """The digits example as int8."""
    samples = digits.model.with_name("heldout.npz")
    options = ("--precision", "int8", "--samples", str(samples), "--max-loss", "2%", "--max", "1")
    document = edge.deploy(digits.model, "digits", *options)
    found = document["precision"]
    assert found["precision"] == "int8"
    assert all(each["reason"] for each in found["recipes"])
    assert document["version"]["number"] == 2, "the original is version 1"
    return "digits"


def test_the_smaller_version_names_its_parent_and_what_was_measured(edge: Stack, smaller: str):
    original, sibling = sorted(edge.cli("versions", smaller)["items"], key=lambda each: each["number"])
    tags, metrics = sibling["metadata"]["tags"], sibling["metadata"]["metrics"]
    assert (tags["precision"], sibling["metadata"]["parent"]) == ("int8", "digits@1")
    assert tags["cpu_flags"]
    assert metrics["loss"] <= 0.02
    assert metrics["size_bytes"] < metrics["size_bytes_fp32"] == original["artifact_size"]
    (replica,) = edge.replicas(f"{smaller}-v2")
    assert "measured here: loss" in replica["message"]
    assert "WARNING" not in replica["message"]


def test_the_stack_is_smaller_and_says_how_large_it_is(
    edge: Stack, smaller: str, digits: Digits, figure: Figure
):
    end = time.monotonic() + PATIENCE_S
    while True:  # a service that does not answer for 3 s is not ready
        status = json.loads(edge.run("status", "--json").stdout)
        if [each["state"] for each in status["services"]] == ["ready"] * 4:
            break
        assert time.monotonic() < end, status["services"]
    children = {child["name"] for child in status["stack"]["children"]}
    assert children == {"epmd", "rabbitmq", "valkey", "valkey-jobs", "migrate", "control", "gateway"}
    parts = {part["name"]: part["pss"] for part in status["memory"]["parts"]}
    assert {"control", "gateway", "rabbitmq", "valkey", "supervisor"} <= set(parts)
    assert status["memory"]["pss"] == sum(parts.values()) < 2**30
    figure(f"edge profile with int8 digits: {status['memory']['pss'] / 2**20:.0f} MiB resident")
    assert "Memory: " in edge.run("status").stdout
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": digits.images[0].tolist()}
    url = f"{edge.settings.gateway_url}/v2/models/{smaller}/infer"
    answer = httpx.post(url, json={"inputs": [tensor]}, timeout=PATIENCE_S, trust_env=False).json()
    assert {each["name"]: each["data"] for each in answer["outputs"]}["label"] == [int(digits.labels[0])]


class Hook(BaseHTTPRequestHandler):
    """Keeps the bodies of webhooks."""

    seen: list[dict] = []  # noqa: RUF012 - of all requests

    def do_POST(self) -> None:
        self.seen.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_a_job_waits_until_the_uplink_is_back(edge: Stack, smaller: str, digits: Digits, tmp_path: Path):
    """The upstream is this stack's own gateway behind a proxy. Nothing listens for the webhook at first."""
    uplink = FaultProxy(edge.settings.gateway_url)
    uplink.faults.extend(closed() for _ in range(10_000))
    file = tmp_path / "signature.json"
    file.write_text(json.dumps(SIGNATURE))
    address = f"{uplink.url.removesuffix('/v1')}/v2/models/{smaller}"
    edge.cli("deploy", "--name", "cloud", "--upstream", address, "--signature", str(file), "--max", "1")
    (port,) = free_ports(1)
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": digits.images[0].tolist()}
    body = {"model": "cloud", "inputs": [tensor], "webhook": f"http://127.0.0.1:{port}/hook"}
    with httpx.Client(base_url=edge.settings.gateway_url, timeout=PATIENCE_S, trust_env=False) as client:
        job = client.post("/v1/jobs", json=body).json()["id"]
        wait_for(lambda: uplink.connections > 1)
        assert client.get(f"/v1/jobs/{job}").json()["status"] == "running"
        uplink.faults.clear()  # the uplink is back
        done = client.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=60"}).json()
        assert (done["status"], done["attempts"]) == ("succeeded", 1)
        wait_for(lambda: len(client.get(f"/v1/jobs/{job}/deliveries").json()["items"]) > 0)
        hooks = ThreadingHTTPServer(("127.0.0.1", port), Hook)  # and so is the receiver
        threading.Thread(target=hooks.serve_forever, daemon=True).start()
        try:
            wait_for(lambda: len(Hook.seen) > 0)
        finally:
            hooks.shutdown()
            hooks.server_close()
    assert (Hook.seen[0]["type"], Hook.seen[0]["data"]["id"]) == ("job.succeeded", job)


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
