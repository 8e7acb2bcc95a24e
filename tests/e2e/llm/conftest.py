"""A stack with a real language model: SmolLM2-135M in llama.cpp, as packages bring both.

With ``TIDEGATE_TEST_LLM_ENGINE=vllm`` the engine is vLLM (`make test-vllm`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import httpx
import pytest

from benchmarks import smollm2
from deploy.bootstrap.step import StepFailed
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack

ENGINE = os.environ.get("TIDEGATE_TEST_LLM_ENGINE", "llamacpp")
SLOTS = 2
START_S = 1200.0
# SmolLM2 has no template for tools. This one is ChatML, as SmolLM2 wants it, with tools as Hermes has them.
TOOL_TEMPLATE = Path(__file__).parent / "tools.jinja"

# llama.cpp returns embeddings and text from one model; vLLM does either of them.
ARGUMENTS = {
    "llamacpp": {
        "embedding": "true",
        "pooling_type": "mean",
        "chat_template": TOOL_TEMPLATE.read_text(),
    },
    "vllm": {
        "dtype": "float32",
        "chat-template": TOOL_TEMPLATE.read_text(),
        "enable-auto-tool-choice": "true",
        "tool-call-parser": "hermes",
        # Inside JSON, vLLM lets a model write white space without end, which a small model does.
        "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    },
}


@pytest.fixture(scope="session")
def smollm2_model() -> Path:
    """The packaged model. Without the package, the test is skipped and says why."""
    try:
        return smollm2.provide("hf" if ENGINE == "vllm" else "q4")
    except StepFailed as failure:
        pytest.skip(f"{failure.what} {failure.remedy}")


@pytest.fixture(scope="session")
def smol(stack: Stack, smollm2_model: Path) -> str:
    """The model, deployed as ``smol``."""
    words = [f"{name}={value}" for name, value in ARGUMENTS[ENGINE].items()]
    arguments = [word for each in words for word in ("--engine-arg", each)]
    stack.cli(
        *("deploy", str(smollm2_model), "--name", "smol", "--engine", ENGINE, "--min", "1"),
        *("--slots", str(SLOTS), "--context", "1024", *arguments),
        *(("--no-wait",) if ENGINE == "vllm" else ("--wait", "--timeout", "120")),
    )
    if ENGINE == "vllm":
        wait_for_vllm(stack, "smol")
    wait_longer(stack, "smol")
    return "smol"


def wait_longer(stack: Stack, name: str) -> None:
    """Give requests of an endpoint minutes instead of 30 s: all clients share two slots of a busy machine."""
    headers = {"Authorization": f"Bearer {stack.settings.service_token}"}
    url = f"{stack.settings.registry_url}/v1/endpoints/{name}"
    body = {"targets": [{"deployment": f"{name}-v1"}], "default_timeout_ms": 300_000}
    changed = httpx.put(url, json=body, headers=headers, trust_env=False, timeout=PATIENCE_S)
    assert changed.status_code == 200, changed.text


def wait_for_vllm(stack: Stack, name: str) -> None:
    """Wait until vLLM serves. On a busy machine it starts for minutes."""
    headers = {"Authorization": f"Bearer {stack.settings.service_token}"}
    url = f"{stack.settings.registry_url}/v1/deployments"
    found = httpx.get(url, headers=headers, trust_env=False).json()["items"]
    (deployment,) = [each["name"] for each in found if each["model"] == name]
    longer = {"start_timeout_s": START_S}
    changed = httpx.patch(f"{url}/{deployment}", json=longer, headers=headers, trust_env=False)
    assert changed.status_code == 200, changed.text
    end = time.monotonic() + START_S
    while not any(replica["state"] == "ready" for replica in stack.replicas(deployment)):
        assert time.monotonic() < end, stack.run("why", name).stdout
        time.sleep(1.0)
