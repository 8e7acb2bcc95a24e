"""A real language model that sleeps: a stream wakes it, and it sleeps again when the stream has ended."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TOKENS = 160
# The stream takes longer than the time after which an idle replica ends.
CHAT = {
    "model": "dozer",
    "messages": [{"role": "user", "content": "Count from 1 to 20."}],
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def asleep(stack: Stack) -> None:
    end = time.monotonic() + PATIENCE_S
    while stack.replicas("dozer-v1"):
        assert time.monotonic() < end, stack.replicas("dozer-v1")
        time.sleep(0.2)


def test_a_stream_wakes_a_sleeping_model_that_sleeps_only_after_its_end(stack: Stack, smollm2_model: Path):
    sizes = ("--slots", "2", "--context", "512", "--min", "0", "--max", "1", "--scale-to-zero-after", "1")
    stack.cli("deploy", str(smollm2_model), "--name", "dozer", "--engine", "llamacpp", *sizes, "--wait")
    asleep(stack)
    woken = len(stack.cli("cold-starts", "dozer-v1")["items"])

    url = f"{stack.settings.gateway_url}/v1/chat/completions"
    headers = {"X-Tidegate-Queue": "on", "X-Request-Timeout-Ms": "120000"}
    comments, tokens = [], 0
    with httpx.stream("POST", url, json=CHAT, headers=headers, timeout=PATIENCE_S) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith(":"):
                comments.append(line)
            elif line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    assert tokens == TOKENS
    assert comments, "nothing says that the model wakes"

    asleep(stack)
    # The start of the deployment itself may be recorded late.
    assert len(stack.cli("cold-starts", "dozer-v1")["items"]) > woken
