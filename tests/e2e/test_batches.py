"""A batch on the whole stack: by the command line, and through the death of its gateway."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tests.e2e.conftest import Digits, Stack

pytestmark = pytest.mark.e2e

PATIENCE_S = 120.0


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=60) as made:
        yield made


def write(file: Path, digits: Digits, count: int) -> list[int]:
    """A file of requests; gives the labels that are right."""
    flat = digits.images.reshape(len(digits.images), -1)
    at = [n % len(flat) for n in range(count)]
    with file.open("wb") as out:
        for n in at:
            tensor = {
                "name": "image",
                "datatype": "FP32",
                "shape": [1, flat.shape[1]],
                "data": flat[n].tolist(),
            }
            out.write(orjson.dumps({"id": f"image {n}", "inputs": [tensor]}) + b"\n")
    return [int(np.argmax(digits.probabilities[n])) for n in at]


def labels(rows: list[dict[str, Any]]) -> list[int]:
    return [
        int(output["data"][0])
        for row in rows
        for output in row["response"]["outputs"]
        if output["name"] == "label"
    ]


def test_a_file_by_the_command_line(stack: Stack, served: str, digits: Digits, tmp_path: Path):
    expected = write(tmp_path / "in.jsonl", digits, 1000)
    out = tmp_path / "out.jsonl"
    found = stack.cli("batch", str(tmp_path / "in.jsonl"), "--model", served, "-o", str(out), timeout_s=400)
    assert (found["status"], found["counts"]["succeeded"]) == ("completed", 1000)
    rows = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1000))
    assert labels(rows) == expected
    assert stack.cli("batch", found["id"], "-o", str(out))["status"] == "completed"


def test_a_gateway_is_killed_in_the_middle(
    stack: Stack, http: httpx.Client, served: str, digits: Digits, tmp_path: Path
):
    expected = write(tmp_path / "in.jsonl", digits, 6000)
    content = (tmp_path / "in.jsonl").read_bytes()
    batch = http.post("/v1/batches", params={"model": served}, content=content).json()
    end = time.monotonic() + 4 * PATIENCE_S
    while http.get(batch["urls"]["status"]).json()["done"] < 500:
        assert time.monotonic() < end
        time.sleep(0.02)
    stack.child("gateway").kill()
    found: dict[str, Any] = {}
    while not found.get("finished_at"):
        assert time.monotonic() < end, found
        time.sleep(0.2)
        try:
            answer = http.get(batch["urls"]["status"])
            found = answer.json() if answer.status_code == 200 else {}
        except httpx.TransportError:
            continue
    assert (found["status"], found["counts"]["succeeded"]) == ("completed", 6000)
    rows = [orjson.loads(line) for line in http.get(batch["urls"]["results"]).content.splitlines()]
    assert [row["line"] for row in rows] == list(range(6000))
    assert labels(rows) == expected
    assert len({row["job"] for row in rows}) == 6000
