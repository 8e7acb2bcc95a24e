"""The choice of the requests that are traced."""

from __future__ import annotations

import random

import pytest

from services.gateway.domain.trace_sampling import DEFAULT_RATIO, TraceSampler, sampler_of
from tidegate.kernel.protocol.trace_context import TraceContext

pytestmark = pytest.mark.unit


def parent(trace_id: int, sampled: bool) -> TraceContext:
    return TraceContext(trace_id, 1, sampled)


def test_without_variables_one_request_in_100_is_traced():
    assert sampler_of({}) == TraceSampler(DEFAULT_RATIO, by_parent=True)


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("always_on", "", TraceSampler(1.0, by_parent=False)),
        ("parentbased_always_off", "", TraceSampler(0.0, by_parent=True)),
        ("traceidratio", "0.25", TraceSampler(0.25, by_parent=False)),
        ("parentbased_traceidratio", "1", TraceSampler(1.0, by_parent=True)),
    ],
)
def test_the_variables_choose(name: str, argument: str, expected: TraceSampler):
    assert sampler_of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}) == expected


@pytest.mark.parametrize(
    "environment",
    [
        {"OTEL_TRACES_SAMPLER": "jaeger_remote"},
        {"OTEL_TRACES_SAMPLER_ARG": "many"},
        {"OTEL_TRACES_SAMPLER_ARG": "1.5"},
        {"OTEL_TRACES_SAMPLER_ARG": "nan"},
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str]):
    with pytest.raises(ValueError, match="expected"):
        sampler_of(environment)


def test_a_caller_decides_for_its_trace():
    sampler = TraceSampler(0.0)
    assert sampler.take(parent(5, True), random.random)
    assert not TraceSampler(1.0).take(parent(5, False), random.random)


def test_a_ratio_without_a_parent_is_met():
    generator = random.Random(7)
    taken = sum(TraceSampler(0.1).take(None, generator.random) for _ in range(20_000))
    assert 1_850 < taken < 2_150


def test_all_services_take_the_same_traces():
    sampler = TraceSampler(0.5, by_parent=False)
    generator = random.Random(7)
    ids = [generator.getrandbits(128) for _ in range(2_000)]
    taken = [sampler.take(parent(each, False), lambda: 0.99) for each in ids]
    assert taken == [sampler.take(parent(each, True), lambda: 0.01) for each in ids]
    assert 900 < sum(taken) < 1_100
