"""Streams of a real language model, while one of its two workers is killed, or leaves."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks import smollm2
from deploy.bootstrap.step import StepFailed
from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import Stack
from tests.e2e.sockets import break_all, connections_of

# The first test starts two replicas and makes the weights, which takes minutes on a busy machine.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

everything = pytest.mark.skipif(
    not os.environ.get("LLM_LOSSES"), reason="takes a minute: `make test-llm-losses` runs it"
)

MODEL = "durable"
SLOTS, TOKENS = 8, 48
# The model is sure of each of these tokens. Elsewhere two tokens may be so near that the engine's choice
# depends on what else it works on, which changes with the loss of a worker.
CHATS = ("Count from 1 to 20.", "Repeat after me: one two three four five six seven eight nine ten.")
NUMBERS = (3, 17, 31, 34, 40, 75)
STREAMS = 2 * len(CHATS) + 2 * len(NUMBERS)


@pytest.fixture(scope="module")
def weights() -> Path:
    """The model with float32 weights: only with them, llama.cpp's greedy answers are always the same."""
    try:
        return smollm2.provide("f32")
    except StepFailed as failure:
        pytest.skip(f"{failure.what} {failure.remedy}")


@pytest.fixture(scope="module")
def durable(stack: Stack, weights: Path) -> set[str]:
    """The model on two replicas, whose names these are."""
    size = ("--slots", str(SLOTS), "--context", "512", "--min", "2", "--max", "2")
    stack.deploy(weights, MODEL, *size)
    # Replicas that start from now on hand their streams over soon after they begin to drain.
    url = f"{stack.settings.registry_url}/v1/deployments/{MODEL}-v1"
    key = {"Authorization": f"Bearer {stack.settings.service_token}"}
    httpx.patch(url, json={"drain_limit_s": 1}, headers=key, timeout=PATIENCE_S).raise_for_status()
    both_ready(stack)
    return {replica["replica"] for replica in ready(stack)}


def ready(stack: Stack) -> list[dict[str, Any]]:
    return [r for r in stack.replicas(f"{MODEL}-v1") if r["state"] == "ready"]


def both_ready(stack: Stack) -> None:
    end = time.monotonic() + PATIENCE_S
    while len(ready(stack)) < 2:
        assert time.monotonic() < end, stack.replicas(f"{MODEL}-v1")
        time.sleep(0.1)


def requests(**fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the paths and bodies of all streams."""
    chats = [{"messages": [{"role": "user", "content": text}]} for text in CHATS]
    texts = [{"prompt": "".join(f"{first + at}, " for at in range(12)).strip()} for first in NUMBERS]
    options = {"include_usage": True}
    common = {
        "model": MODEL,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": options,
    }
    found = [("chat/completions", {**each, **common, **fields}) for each in 2 * chats]
    return found + [("completions", {**each, **common, **fields}) for each in 2 * texts]


class Stream:
    """What a caller has got of one stream."""

    def __init__(self) -> None:
        self.text, self.ids, self.error = "", set[str](), ""
        self.usage = (0, 0)
        self.done = False

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            self.done |= line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                self.error = event["error"]["message"]
                continue
            self.ids.add(event["id"])
            if usage := event.get("usage"):
                self.usage = (usage["prompt_tokens"], usage["completion_tokens"])
            for choice in event["choices"]:
                self.text += choice.get("text") or choice.get("delta", {}).get("content") or ""


def run(
    stack: Stack, asked: list[tuple[str, dict[str, Any]]], begun: Callable[[], None] = lambda: None
) -> list[Stream]:
    """Run streams together. ``begun`` is called when most of them have some text."""
    streams = [Stream() for _ in asked]

    def one(stream: Stream, request: tuple[str, dict[str, Any]]) -> None:
        path, body = request
        url = f"{stack.settings.gateway_url}/v1/{path}"
        headers = {"X-Request-Timeout-Ms": "120000"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=PATIENCE_S) as answer:
            assert answer.status_code == 200, answer.read()
            stream.read(answer.iter_lines())

    def watch() -> None:
        end = time.monotonic() + PATIENCE_S
        most = len(streams) * 3 // 4  # the others may wait for a slot
        while sum(bool(stream.text) for stream in streams) < most and time.monotonic() < end:
            time.sleep(0.01)
        begun()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(one, streams, asked))
    watcher.join()
    return streams


def verdict(stream: Stream, expected: Stream) -> str:
    if stream.error:
        return "error" if not stream.done and expected.text.startswith(stream.text) else "bad error"
    same = stream.text == expected.text and stream.usage == expected.usage
    return "same" if same and stream.done and len(stream.ids) == 1 else "different"


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, durable: set[str]) -> list[Stream]:
    """The answers without a loss."""
    streams = run(stack, requests())
    assert all(stream.done and stream.usage[1] for stream in streams)
    return streams


def counted(streams: list[Stream], undisturbed: list[Stream]) -> dict[str, int]:
    """Return the numbers of streams by verdict. Show those that are not as they should be."""
    for stream, expected in zip(streams, undisturbed, strict=True):
        if verdict(stream, expected) != "same":
            print(vars(stream), vars(expected))
    return dict(Counter(map(verdict, streams, undisturbed)))


def kill_worker(stack: Stack) -> None:
    psutil.Process(ready(stack)[0]["pid"]).kill()


def kill_engine(stack: Stack) -> None:
    """Kill the process that llama.cpp runs in, beside the worker's Triton."""
    worker = psutil.Process(ready(stack)[0]["pid"])
    processes = worker.children(recursive=True)
    (engine,) = [p for p in processes if "triton_python_backend_stub" in " ".join(p.cmdline()[:1])]
    engine.kill()


def break_connections_to_broker(stack: Stack) -> None:
    """Break the gateway's connections to RabbitMQ."""
    port = stack.settings.rabbitmq_port
    gateway = stack.child("gateway")
    found = connections_of(
        gateway, lambda each: each.family == socket.AF_INET and each.getpeername()[1] == port
    )
    assert found
    break_all(found)


def check_loss(
    stack: Stack, undisturbed: list[Stream], figure: Figure, lose: Callable[[Stack], None]
) -> None:
    """Check that all streams are those of an undisturbed run, although something was lost under them."""
    streams = run(stack, requests(), lambda: lose(stack))
    counts = counted(streams, undisturbed)
    figure(f"{lose.__name__} of one of two replicas under {STREAMS} streams: {counts}")
    assert counts == {"same": STREAMS}
    both_ready(stack)


def test_a_worker_is_killed(stack: Stack, undisturbed: list[Stream], figure: Figure):
    check_loss(stack, undisturbed, figure, kill_worker)


@everything
@pytest.mark.parametrize("lose", [kill_engine, break_connections_to_broker])
def test_other_losses(stack: Stack, undisturbed: list[Stream], figure: Figure, lose: Callable[[Stack], None]):
    check_loss(stack, undisturbed, figure, lose)


@everything
def test_streams_of_a_replica_that_drains_move_to_the_other(
    stack: Stack, durable: set[str], undisturbed: list[Stream], figure: Figure
):
    leaving = next(r["replica"] for r in ready(stack) if r["replica"] not in durable)

    def drain(stack: Stack) -> None:
        stack.cli("drain", leaving)

    check_loss(stack, undisturbed, figure, drain)


@everything
def test_streams_that_cannot_continue_say_why(stack: Stack, undisturbed: list[Stream], figure: Figure):
    chats = 2 * len(CHATS)
    streams = run(stack, requests(logprobs=1)[chats:], lambda: kill_worker(stack))
    counts = counted(streams, undisturbed[chats:])
    figure(f"kill_worker under streams with log probabilities: {counts}")
    assert set(counts) == {"same", "error"}
    assert all("because it has log probabilities" in s.error for s in streams if s.error)
    both_ready(stack)


def begin(stack: Stack, body: dict[str, Any]) -> socket.socket:
    """Begin a stream, and return its connection."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(raw)}\r\n"
    found = socket.create_connection(("127.0.0.1", stack.settings.gateway_port), timeout=PATIENCE_S)
    found.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
    return found


def read_until(connection: socket.socket, word: bytes) -> None:
    found = b""
    while word not in found:
        data = connection.recv(65536)
        assert data, found
        found += data


@everything
def test_callers_that_leave_free_their_slots(stack: Stack, durable: set[str], figure: Figure):
    long = {"model": MODEL, "prompt": "1, 2, 3,", "max_tokens": 480, "ignore_eos": True, "stream": True}
    short = {"model": MODEL, "prompt": "1, 2, 3,", "max_tokens": 1}
    url = f"{stack.settings.gateway_url}/v1/completions"
    streams = [begin(stack, long) for _ in range(2 * SLOTS)]
    for each in streams:
        read_until(each, b"data: {")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, url, json=short, timeout=PATIENCE_S)
        time.sleep(0.5)
        assert not waiting.done(), "all slots are taken"
        last = streams.pop()
        for each in streams:
            each.close()
        left = time.monotonic()
        assert waiting.result().status_code == 200
        took = time.monotonic() - left
    figure(f"{2 * SLOTS - 1} callers left: a request that waited for a slot was answered after {took:.2f} s")
    last.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while data := last.recv(65536):
            assert b"[DONE]" not in data, "the stream that stayed still runs"
    last.close()
