"""The unmodified clients of language models, each in its own process, against one deployed model.

A client's script has a function for each check. All scripts run at the same time, once. Then each check is a
test here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tests.e2e.llm.conftest import ENGINE, SLOTS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SKIPPED = "skipped: "
SCRIPTS = sorted((Path(__file__).parent / "clients").glob("use_*.py"))


def checks(script: Path) -> list[str]:
    """Return the names of a script's checks. Its imports are not there in this environment."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.parse(script.read_text()).body if isinstance(node, functions)]
    return [name for name in names if name.startswith("check_")]


CHECKS = [(script.stem, check) for script in SCRIPTS for check in checks(script)]


def limited_key(stack: Stack) -> str:
    """Return a key that may send one request in a thousand seconds, once the gateway knows it."""
    limits = ("--scope", "infer", "--rate", "0.001", "--burst", "1")
    key: str = stack.cli("keys", "create", "limited", *limits)["key"]
    end = time.monotonic() + PATIENCE_S
    headers = {"Authorization": f"Bearer {key}"}
    while httpx.get(f"{stack.settings.gateway_url}/v1/models", headers=headers).status_code == 401:
        assert time.monotonic() < end, "the gateway does not learn the key"
        time.sleep(0.1)
    return key


@pytest.fixture(scope="session")
def outcomes(stack: Stack, smol: str, clients_python: Path) -> Iterator[dict[tuple[str, str], str | None]]:
    """Run all scripts; return what failed, by script and check."""
    given = {
        "url": stack.settings.gateway_url,
        "model": smol,
        "slots": str(SLOTS),
        "engine": ENGINE,
        "limited_key": limited_key(stack),
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "LLM_CLIENTS": json.dumps(given),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    started = [
        subprocess.Popen(
            [clients_python, script], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for script in SCRIPTS
    ]
    found: dict[tuple[str, str], str | None] = {}
    try:
        for script, process in zip(SCRIPTS, started, strict=True):
            output, _ = process.communicate(timeout=1500)
            for line in output.splitlines():
                if line.startswith('{"check"'):
                    report = json.loads(line)
                    found[script.stem, report["check"]] = report["failed"]
            found.setdefault((script.stem, ""), f"exit status {process.returncode}\n{output[-3000:]}")
        yield found
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize(("client", "check"), CHECKS, ids=[f"{c[4:]}-{n[6:]}" for c, n in CHECKS])
def test_client(outcomes: dict[tuple[str, str], str | None], client: str, check: str) -> None:
    failed = outcomes.get((client, check), f"the check did not run: {outcomes[client, '']}")
    if failed is not None and failed.startswith(SKIPPED):
        pytest.skip(failed)
    assert failed is None, failed


def post(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{stack.settings.gateway_url}{path}", json=body, timeout=PATIENCE_S).json()


def test_tokens_and_their_text(stack: Stack, smol: str) -> None:
    """No client of its own: the three forms of a request have the tokens of the same text."""
    vllm = post(stack, "/tokenize", {"model": smol, "prompt": "One, two", "return_token_strs": True})
    assert vllm["count"] == len(vllm["tokens"]) == len(vllm["token_strs"]) > 2
    assert post(stack, "/tokenize", {"model": smol, "content": "One, two"})["tokens"] == vllm["tokens"]
    tgi = post(stack, "/tokenize", {"model": smol, "inputs": "One, two"})
    assert [token["id"] for token in tgi] == vllm["tokens"]
    text = post(stack, "/detokenize", {"model": smol, "tokens": vllm["tokens"]})
    assert text["prompt"] == "One, two"
    chat = post(stack, "/tokenize", {"model": smol, "messages": [{"role": "user", "content": "One, two"}]})
    assert chat["count"] > vllm["count"]


def test_a_route_that_the_engine_lacks_is_named(stack: Stack, smol: str) -> None:
    body = {"model": smol, "text_1": "a", "text_2": "b", "input": "a"}
    assert "/pooling" in post(stack, "/pooling", body)["error"]["message"]
