"""Traces of the whole stack, received over OTLP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.otlp import Receiver, receiver
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Digits, Stack, running_stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BATCH = 32


@pytest.fixture(scope="module")
def received() -> Iterator[Receiver]:
    with receiver() as found:
        yield found


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, received: Receiver, digits: Digits) -> Iterator[Stack]:
    """A stack that exports traces, with a model whose calls wait for 32 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        with running_stack(tmp_path_factory.mktemp("traced") / "state", gateway_processes=1) as stack:
            options = ("--min", "1", "--max", "1", "--max-batch", str(BATCH), "--batch-window-ms", "5000")
            stack.deploy(digits.model, "digits", *options)
            yield stack


def body(digits: Digits, at: int) -> dict[str, Any]:
    tensor = {
        "name": "image",
        "datatype": "FP32",
        "shape": [1, *digits.images[at].shape],
        "data": digits.images[at].ravel().tolist(),
    }
    return {"inputs": [tensor]}


def parent(trace_id: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}


def wait_for(found: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_a_batch_of_32_gives_32_traces_that_reach_the_shared_call(
    traced: Stack, received: Receiver, digits: Digits
):
    url = f"{traced.settings.gateway_url}/v2/models/digits/infer"
    ids = [f"{number + 1:032x}" for number in range(BATCH)]

    def ask(number: int) -> int:
        return http.post(url, json=body(digits, number), headers=parent(ids[number])).status_code

    with httpx.Client(timeout=PATIENCE_S) as http, ThreadPoolExecutor(BATCH) as callers:
        assert set(callers.map(ask, range(BATCH))) == {200}
    wait_for(
        lambda: all(
            {"rest digits", "send digits-v1", "process digits-v1"} <= names(received, i) for i in ids
        ),
        "not every trace has its spans",
    )
    calls = [span for service, span in received.spans() if span.name == "call digits-v1"]
    (call,) = [span for span in calls if span.trace_id.hex() in ids]
    processes = {
        span.trace_id.hex(): span for _, span in received.spans() if span.name == "process digits-v1"
    }
    reached = [
        trace_id
        for trace_id in ids
        if call.parent_span_id == processes[trace_id].span_id
        or any(link.span_id == call.span_id for link in processes[trace_id].links)
    ]
    assert len(reached) == BATCH
    assert len(call.links) == BATCH - 1
    for trace_id in ids:
        spans = {span.name: span for _, span in received.spans(trace_id)}
        server, send, process = spans["rest digits"], spans["send digits-v1"], spans["process digits-v1"]
        assert server.parent_span_id.hex() == "00f067aa0ba902b7"
        assert (send.parent_span_id, process.parent_span_id) == (server.span_id, send.span_id)
        assert server.start_time_unix_nano <= send.start_time_unix_nano <= process.start_time_unix_nano
        assert process.end_time_unix_nano <= send.end_time_unix_nano + 5_000_000


def names(received: Receiver, trace_id: str) -> set[str]:
    return {span.name for _, span in received.spans(trace_id)}


def test_a_failed_request_is_exported_although_nobody_samples_it(traced: Stack, received: Receiver):
    url = f"{traced.settings.gateway_url}/v2/models/digits/infer"
    headers = {"X-Request-Id": "broken-1"}
    assert httpx.post(url, json={"inputs": []}, headers=headers, timeout=60).status_code == 400

    def mine() -> list[Any]:
        return [
            span
            for _, span in received.spans()
            if any(each.value.string_value == "broken-1" for each in span.attributes)
        ]

    wait_for(lambda: bool(mine()), "the failure is not exported")
    (span,) = mine()
    assert span.name == "rest digits"
    assert span.status.message.startswith("bad_request: ")


def test_a_request_that_nobody_samples_is_not_exported(traced: Stack, received: Receiver, digits: Digits):
    url = f"{traced.settings.gateway_url}/v2/models/digits/infer"
    # Spans of earlier tests may still arrive. A request that nobody samples would have a trace of its own.
    known = {span.trace_id.hex() for _, span in received.spans()} | {"f" * 32}
    with httpx.Client(timeout=60) as http, ThreadPoolExecutor(BATCH) as callers:
        answers = list(callers.map(lambda at: http.post(url, json=body(digits, at)), range(BATCH)))
        assert {answer.status_code for answer in answers} == {200}
    job = httpx.post(
        url, json=body(digits, 0), headers=parent("f" * 32) | {"Prefer": "respond-async"}, timeout=60
    )
    assert job.status_code == 202
    wait_for(
        lambda: {"job digits", "process digits-v1"} <= names(received, "f" * 32), "the job has no whole trace"
    )
    others = [span for _, span in received.spans() if span.trace_id.hex() not in known]
    assert not others, [span.name for span in others]
