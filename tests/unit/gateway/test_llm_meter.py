"""Metrics of language models: what one request adds to each histogram."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from services.gateway.application.llm import meter
from services.gateway.application.llm.meter import LlmMeters

pytestmark = pytest.mark.unit


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: ``clock[0]`` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(meter, "perf_counter", lambda: now[0])
    return now


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"tidegate_llm_{name}", labels) or 0.0


def test_a_stream(clock):
    meters = LlmMeters()
    labels = {"endpoint": "stream", "band": "high"}
    call = meters.begin("stream", "high", streamed=True)
    clock[0] += 2.0
    call.events((20, 1, 16), 1, 0.5)
    clock[0] += 0.09
    call.events((20, 4, 16), 1, 0.59)
    clock[0] += 0.3
    call.events(None, 1, 0.9)
    clock[0] += 0.01
    call.end()
    assert value("time_to_first_token_seconds_sum", **labels) == pytest.approx(2.0)
    assert value("queue_time_seconds_sum", **labels) == pytest.approx(1.5)
    assert value("request_duration_seconds_sum", **labels) == pytest.approx(2.4)
    assert value("inter_token_latency_seconds_count", **labels) == 4, "three tokens, and one of unknown usage"
    assert value("inter_token_latency_seconds_sum", **labels) == pytest.approx(0.39)
    assert value("inter_token_latency_seconds_bucket", le="0.05", **labels) == 3
    assert value("inter_token_latency_seconds_bucket", le="0.3", **labels) == pytest.approx(4)
    assert value("prompt_tokens_sum", **labels) == 20
    assert value("answer_tokens_sum", **labels) == 4
    assert value("tokens_total", kind="answer", **labels) == 4
    assert value("cached_prompt_tokens_total", **labels) == 16
    meters.forget("stream")
    assert value("prompt_tokens_count", **labels) == 0


def test_a_request_that_the_engine_never_saw_adds_nothing(clock):
    meters = LlmMeters()
    meters.begin("refused", "low", streamed=True).end()
    labels = {"endpoint": "refused", "band": "low"}
    assert value("request_duration_seconds_count", **labels) == 0
    assert value("prompt_tokens_count", **labels) == 0


def test_a_gap_above_all_buckets_counts_as_infinite(clock):
    call = LlmMeters().begin("slow", "normal", streamed=True)
    call.events(None, 1, 0.0)
    clock[0] += 1000.0
    call.events(None, 1, 0.0)
    call.end()
    labels = {"endpoint": "slow", "band": "normal"}
    assert value("inter_token_latency_seconds_count", **labels) == 1
    assert value("inter_token_latency_seconds_bucket", le="2.5", **labels) == 0


def test_an_answer_in_one_piece_has_no_first_token(clock):
    call = LlmMeters().begin("whole", "normal", streamed=False)
    clock[0] += 2.0
    call.events((5, 7, 0), 1, 0.5)
    call.end()
    labels = {"endpoint": "whole", "band": "normal"}
    assert value("time_to_first_token_seconds_count", **labels) == 0
    assert value("request_duration_seconds_sum", **labels) == pytest.approx(2.0)
    assert value("answer_tokens_sum", **labels) == 7
