"""How many messages to hold and how many calls to have open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.domain.call_duration import Mean
from services.worker.domain.concurrency import calls_in_flight, effective_concurrency
from services.worker.domain.prefetch import (
    MAX_PREFETCH,
    consumer_prefetch,
    prefetch,
    without_margin,
    worth_changing,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("instances", "batches", "call_ms", "expected"),
    [
        (1, True, None, 1),
        (1, True, 0.1, 1),
        (3, True, 500.0, 3),
        (1, False, None, 2),
        (1, False, 0.1, 9),
        (2, False, 4.9, 10),
        (2, False, 5.0, 3),
    ],
)
def test_calls_in_flight(instances, batches, call_ms, expected):
    assert calls_in_flight(instances=instances, batches=batches, call_ms=call_ms) == expected


@pytest.mark.parametrize(
    ("batches", "call_ms", "expected"),
    [(True, 20.0, 1), (False, 20.0, 1), (False, None, 1), (False, 3.0, 2), (False, 0.3, 9)],
)
def test_fewer_calls_are_open_while_several_callers_share_a_model(batches, call_ms, expected):
    assert calls_in_flight(instances=1, batches=batches, call_ms=call_ms, shared=True) == expected


@pytest.mark.parametrize(
    ("call_ms", "batch_mean", "frames", "in_flight", "expected"),
    [
        (None, None, 1, 1, 2),
        (None, None, 1, 9, 10),
        (0.0, 1.0, 1, 1, 2),
        (20.0, 1.0, 1, 1, 3),
        (1000.0, 1.0, 1, 1, 2),
        (1000.0, 1.0, 1, 4, 5),
        (10.0, 10.0, 1, 1, 50),
        (10.0, 10.0, 10, 1, 5),
        (0.01, 1.0, 1, 1, MAX_PREFETCH),
        (10.0, None, 1, 1, 5),
        (10.0, 0.2, 0.1, 1, 5),
    ],
)
def test_prefetch(call_ms, batch_mean, frames, in_flight, expected):
    found = prefetch(call_ms=call_ms, batch_mean=batch_mean, frames_per_message=frames, max_calls=in_flight)
    assert found == expected


@given(
    st.none() | st.just(0.0) | st.floats(1e-6, 1e6),
    st.none() | st.floats(0, 1e4),
    st.floats(0, 256),
    st.integers(1, 72),
)
def test_prefetch_is_within_bounds(call_ms, batch_mean, frames, in_flight):
    found = prefetch(call_ms=call_ms, batch_mean=batch_mean, frames_per_message=frames, max_calls=in_flight)
    assert in_flight + 1 <= found <= MAX_PREFETCH


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4))
def test_a_slower_model_holds_no_more(one, other):
    held = [
        prefetch(call_ms=ms, batch_mean=1.0, frames_per_message=1.0, max_calls=1)
        for ms in sorted((one, other))
    ]
    assert held[0] >= held[1]


@pytest.mark.parametrize(
    ("current", "wanted", "expected"),
    [
        (10, 10, False),
        (10, 14, False),
        (10, 15, True),
        (10, 7, False),
        (10, 6, True),
        (2, 3, True),
        (3, 2, True),
    ],
)
def test_worth_changing(current, wanted, expected):
    assert worth_changing(current, wanted) is expected


def test_a_slow_model_that_batches_can_fill_its_next_call():
    held = prefetch(call_ms=100.0, batch_mean=2.0, frames_per_message=1.0, max_calls=1, max_batch=16)
    assert held == 32
    assert prefetch(call_ms=100.0, batch_mean=2.0, frames_per_message=8.0, max_calls=1, max_batch=16) == 4
    assert prefetch(call_ms=100.0, batch_mean=1.0, frames_per_message=1.0, max_calls=1) == 2


def test_mean():
    mean = Mean(weight=0.5)
    assert mean.value is None
    mean.add(8)
    assert mean.value == 8
    mean.add(0)
    assert mean.value == 4


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_mean_is_between_its_samples(samples, weight):
    mean = Mean(weight=weight)
    for sample in samples:
        mean.add(sample)
    assert mean.value is not None
    assert min(samples) - 1e-6 <= mean.value <= max(samples) + 1e-6


@pytest.mark.parametrize(
    ("batch", "call_rows", "call_requests", "open_calls", "max_concurrency", "expected"),
    [
        (8, None, None, None, None, 24),  # nothing measured: requests of one row
        (8, 8.0, 8.0, 3.0, None, 24),
        (8, 8.0, 2.0, 3.0, None, 6),
        (8, 5.0, 1.0, 3.0, None, 3),  # a second one of five rows does not fit
        (8, 6.0, 2.0, 3.0, None, 6),  # nor a third one of three
        (8, 8.0, 4.5, 3.0, None, 12),  # one of 8 rows in turn with 8 of one: 1.8 rows each
        (8, 300.0, 1.0, 3.0, None, 3),  # never less than one for each instance
        (8, 8.0, 2.0, 3.0, 5, 5),
        (0, 1.0, 1.0, None, None, 3),
        (0, 1.0, 1.0, 1.5, None, 3),  # they are not all busy: a call has the model for itself
        (0, 1.0, 1.0, 7.5, None, 7.5),
        (0, 1.0, 1.0, 7.5, 2, 2),
    ],
)
def test_effective_concurrency(batch, call_rows, call_requests, open_calls, max_concurrency, expected):
    found = effective_concurrency(
        instances=3,
        batch=batch,
        call_rows=call_rows,
        call_requests=call_requests,
        open_calls=open_calls,
        max_concurrency=max_concurrency,
    )
    assert found == expected


@pytest.mark.parametrize("messages", [1, 2, 3, 5, 50, 256])
def test_a_consumer_has_a_margin_for_callers_within_their_share(messages):
    prefetch_ = consumer_prefetch(messages)
    assert prefetch_ > messages
    assert messages <= without_margin(prefetch_) < prefetch_
