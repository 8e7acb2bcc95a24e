"""A real language model: its metrics in Prometheus, and a batch of prompts while parts are killed."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tests.e2e.prometheus import attached, needs_prometheus, panels, until_none, without_data

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPTS = 40
URL = "/v1/completions"


def lines(model: str) -> bytes:
    requests = [
        {
            "custom_id": f"prompt-{n}",
            "method": "POST",
            "url": URL,
            "body": {"model": model, "prompt": f"{n} and", "max_tokens": 12, "temperature": 0},
        }
        for n in range(PROMPTS)
    ]
    return "".join(json.dumps(request) + "\n" for request in requests).encode()


def get(stack: Stack, path: str, **given: Any) -> httpx.Response:
    """GET a path of the gateway, again while it is away."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            answer = httpx.get(f"{stack.settings.gateway_url}{path}", timeout=60, **given)
            if answer.status_code < 500:
                return answer
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"{path} is not answered"
        time.sleep(0.1)


def jobs(stack: Stack, batch: str, status: str) -> list[dict[str, Any]]:
    params = {"batch": batch.removeprefix("batch_"), "status": status, "limit": 1000}
    found: list[dict[str, Any]] = get(stack, "/v1/jobs", params=params).json()["items"]
    return found


def wait_jobs(stack: Stack, batch: str, status: str, least: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while len(jobs(stack, batch, status)) < least:
        assert time.monotonic() < end, f"fewer than {least} jobs are {status}"
        time.sleep(0.05)


@needs_prometheus
def test_the_panels_of_language_models_have_data(stack: Stack, smol: str, tmp_path: Path) -> None:
    body = {"model": smol, "prompt": "One, two,", "max_tokens": 8, "temperature": 0, "stream": True}
    empty = {"Lost streams"}
    with attached(stack, tmp_path) as prometheus:

        def missing() -> list[str]:
            for _ in range(3):
                answer = httpx.post(f"{stack.settings.gateway_url}{URL}", json=body, timeout=PATIENCE_S)
                answer.raise_for_status()
            if not prometheus.ask("query", query="endpoint:tidegate_llm_tokens:rate1m")["result"]:
                return ["the recording rules"]
            return without_data(prometheus, panels(prometheus, "language-models"), empty)

        until_none(missing, "panels without data")


def test_every_prompt_has_one_result_whatever_is_killed(stack: Stack, smol: str) -> None:
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=60) as http:
        upload = {"file": ("prompts.jsonl", lines(smol))}
        answer = http.post("/v1/files", files=upload, data={"purpose": "batch"})
        file = answer.raise_for_status().json()
        wish = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
        batch = http.post("/v1/batches", json=wish).raise_for_status().json()
    wait_jobs(stack, batch["id"], "succeeded", 4)
    wait_jobs(stack, batch["id"], "running", 1)
    for victim in (stack.worker(f"{smol}-v1"), stack.child("router"), stack.child("gateway")):
        victim.kill()
    end = time.monotonic() + 3 * PATIENCE_S
    while (batch := get(stack, f"/v1/batches/{batch['id']}").json())["status"] != "completed":
        assert batch["status"] in ("in_progress", "finalizing"), batch
        assert time.monotonic() < end, batch
        time.sleep(0.2)
    assert batch["request_counts"] == {"total": PROMPTS, "completed": PROMPTS, "failed": 0}
    assert batch["error_file_id"] is None
    content = get(stack, f"/v1/files/{batch['output_file_id']}/content").text
    rows = [json.loads(row) for row in content.splitlines()]
    counts = Counter(row["custom_id"] for row in rows)
    attempts = Counter(job["attempts"] for job in jobs(stack, batch["id"], "succeeded"))
    print(f"{PROMPTS} prompts, {len(rows)} results, {len(counts)} distinct, attempts: {dict(attempts)}")
    assert [row["custom_id"] for row in rows] == [f"prompt-{n}" for n in range(PROMPTS)]
    assert len({row["response"]["request_id"] for row in rows}) == PROMPTS
    assert all(row["response"]["body"]["usage"]["completion_tokens"] > 0 for row in rows)
    assert attempts[1] < PROMPTS, "the kill of the worker cost no job an attempt, so the test shows nothing"
