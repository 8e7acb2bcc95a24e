"""Drift and quality of a served model: sampled by its worker, judged by the router, shown by the commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tidegate import Client

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "drift" / "model.py"
NAME, FEATURES = "drifting", 64


class Traffic:
    """Sends rows of normal features to the model. The first feature of each row is shifted."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._random = np.random.default_rng(1)
        self.shift = 0.0

    def send(self) -> None:
        """Send about a third of a window."""
        for _ in range(4):
            rows = self._random.standard_normal((256, FEATURES)).astype(np.float32)
            rows[:, 0] += self.shift
            self._client.infer(NAME, {"x": rows})


@pytest.fixture(scope="module")
def drifting(stack: Stack) -> str:
    signature = str(MODEL.with_name("signature.json"))
    options = ("--sampling", "10000", "--keep-rows", "5", "--redact", "probabilities")
    stack.deploy(MODEL, NAME, "--signature", signature, *options)
    stack.cli("traffic", NAME, "--feedback")
    return NAME


def until(stack: Stack, command: str, act: Callable[[], Any], ready: Callable[[Any], Any]) -> Any:
    """Act again and again until the command's report of the version is ready. Return the report."""
    end = time.monotonic() + 4 * PATIENCE_S  # many requests and commands, each slow on a busy machine
    while not ready(found := stack.cli(command, NAME)["items"][0]):
        assert time.monotonic() < end, found
        act()
    return found


def test_a_shift_of_one_feature_is_found_and_drawn(
    stack: Stack, drifting: str, client: Client, tmp_path: Path
) -> None:
    traffic = Traffic(client)
    before = until(stack, "drift", traffic.send, lambda found: len(found["points"]) >= 1)
    assert before["state"] == "steady"
    assert before["baseline"]["source"] == "first_rows"
    assert len(before["columns"]) == FEATURES + 3  # and prediction, confidence, score
    traffic.shift = 0.5
    found = until(stack, "drift", traffic.send, lambda found: "x[0]" in found["drifted"])
    assert found["drifted"][0] in ("x[0]", "score", "prediction", "confidence")
    assert not {each for each in found["drifted"] if each.startswith("x[")} - {"x[0]"}
    picture = tmp_path / "drift.svg"
    shown = stack.run("drift", NAME, "--plot", str(picture))
    assert "drifted" in shown.stdout
    ElementTree.fromstring(picture.read_text())


def test_labels_that_callers_send_measure_the_accuracy(stack: Stack, drifting: str) -> None:
    gateway = f"{stack.settings.gateway_url}"
    random = np.random.default_rng(2)
    sent = 0

    def labelled() -> None:
        nonlocal sent
        for _ in range(20):
            row = random.standard_normal((1, FEATURES)).astype(np.float32)
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": row.ravel().tolist()}
            answer = httpx.post(
                f"{gateway}/v2/models/{NAME}/infer", json={"inputs": [tensor]}, trust_env=False
            ).raise_for_status()
            truth = int(row[0, 0] > 0) if sent % 4 else 1 - int(row[0, 0] > 0)
            sent += 1
            item = {"request_id": answer.headers["x-feedback-id"], "label": truth}
            httpx.post(f"{gateway}/v1/feedback", json=item, trust_env=False).raise_for_status()

    found = until(stack, "quality", labelled, lambda found: found["labels_joined"] >= 100)
    measures = found["open"]["measures"]
    assert measures["accuracy"] == pytest.approx(0.75, abs=0.12)
    assert 0 < measures["auc"] < 1
    assert "labels joined" in stack.run("quality", NAME).stdout


def test_raw_rows_are_kept_without_their_redacted_fields(
    stack: Stack, drifting: str, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    end = time.monotonic() + PATIENCE_S
    while stack.run("drift", NAME, "--rows", str(path)).returncode != 0:
        assert time.monotonic() < end
        client.infer(NAME, {"x": np.ones((2, FEATURES), np.float32)})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert 1 <= len(rows) <= 5
    assert len(rows[0]["inputs"]["x"]) == FEATURES
    assert rows[0]["outputs"]["probabilities"] is None
