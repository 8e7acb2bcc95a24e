"""vLLM through the whole stack, as another user in the sandbox: see `make test-vllm`."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks import smollm2
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),
    pytest.mark.skipif("TIDEGATE_TEST_VLLM" not in os.environ, reason="vLLM starts slowly: make test-vllm"),
]

# vLLM takes minutes to start on a busy machine.
START_S = 900.0


def chat(stack: Stack, model: str, **more: Any) -> httpx.Response:
    """Return the good answer to a request, sent again until there is one."""
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    body = {"model": model, "messages": messages, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    url, until = f"{stack.settings.gateway_url}/v1/chat/completions", time.monotonic() + START_S
    while True:
        answer = httpx.post(url, json={**body, **more}, timeout=START_S, trust_env=False)
        if answer.status_code == 200:
            return answer
        assert answer.status_code >= 500, answer.text
        assert time.monotonic() < until, answer.text
        time.sleep(0.5)


def engines(stack: Stack, deployment: str) -> list[psutil.Process]:
    """The processes of vLLM's engine below the Deployment's worker."""
    children = stack.worker(deployment).children(recursive=True)
    return [each for each in children if each.name().startswith("VLLM::Engine")]


def test_a_folder_is_served_by_vllm_which_is_started_again_after_a_kill(stack: Stack):
    began = time.monotonic()
    stack.cli(
        "deploy", str(smollm2.provide("tiny")), "--name", "tiny", "--slots", "4", "--context", "512",
        "--engine-arg", "dtype=float32", "--wait", "--timeout", str(int(START_S)),
        timeout_s=START_S + 60,
    )  # fmt: skip
    print(f"\nserved {time.monotonic() - began:.0f} s after `tidegate deploy`")
    whole = chat(stack, "tiny")
    assert whole.json()["usage"]["completion_tokens"] == 20
    lines = chat(stack, "tiny", stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for e in events for choice in e["choices"])
    assert text == whole.json()["choices"][0]["message"]["content"]
    [engine] = engines(stack, "tiny-v1")
    if os.geteuid() == 0:
        assert engine.uids().real != 0, "the sandbox gives it another user"
    os.kill(engine.pid, signal.SIGKILL)
    killed = time.monotonic()
    again = chat(stack, "tiny")
    assert again.json()["choices"] == whole.json()["choices"]
    print(f"\nan answer {time.monotonic() - killed:.0f} s after the engine was killed")
    left = [each.pid for each in engines(stack, "tiny-v1")]
    stack.cli("delete", "tiny", "--yes")
    until = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}/exe").exists() for pid in left):
        assert time.monotonic() < until, "the engine is left"
        time.sleep(0.1)
