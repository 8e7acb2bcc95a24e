"""The circuit breaker and the limits of an upstream."""

from __future__ import annotations

from types import ModuleType

import pytest

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def breaker(llm_module) -> ModuleType:
    return llm_module("breaker")


def test_failures_in_a_row_open_the_circuit_and_a_success_between_them_does_not(breaker: ModuleType):
    circuit = breaker.Breaker(threshold=3, pause_s=5.0)
    for _ in range(2):
        assert circuit.admit(0.0) == 0
        circuit.fail(0.0)
    circuit.succeed()
    for _ in range(2):
        circuit.fail(0.0)
    assert circuit.state(0.0) == breaker.CLOSED
    circuit.fail(1.0)
    assert circuit.state(1.0) == breaker.OPEN
    assert circuit.admit(2.0) == 4.0


def test_a_half_open_circuit_sends_one_request_and_its_success_closes_it(breaker: ModuleType):
    circuit = breaker.Breaker(threshold=1, pause_s=5.0)
    circuit.fail(0.0)
    assert circuit.state(5.0) == breaker.HALF_OPEN
    assert circuit.admit(5.0) == 0
    assert circuit.admit(5.0) > 0, "only one request at a time"
    circuit.succeed()
    assert (circuit.state(5.0), circuit.admit(5.0)) == (breaker.CLOSED, 0)


def test_each_failed_try_doubles_the_pause_up_to_the_longest(breaker: ModuleType):
    circuit, now, pauses = breaker.Breaker(threshold=1, pause_s=5.0, longest_s=15.0), 0.0, []
    circuit.fail(now)
    for _ in range(4):
        pauses.append(circuit.admit(now))
        now += pauses[-1]
        assert circuit.admit(now) == 0
        circuit.fail(now)
    assert pauses == [5.0, 10.0, 15.0, 15.0]


def test_a_cancelled_try_lets_the_next_request_try(breaker: ModuleType):
    circuit = breaker.Breaker(threshold=1, pause_s=5.0)
    circuit.fail(0.0)
    assert circuit.admit(6.0) == 0
    circuit.abandon()
    assert circuit.admit(6.0) == 0


def test_failures_of_requests_that_were_sent_before_do_not_prolong_the_pause(breaker: ModuleType):
    circuit = breaker.Breaker(threshold=1, pause_s=5.0)
    circuit.fail(0.0)
    circuit.fail(4.0)
    assert circuit.admit(4.0) == 1.0


def test_a_limit_per_minute_fills_up_again_evenly(breaker: ModuleType):
    limit = breaker.MinuteLimit(60, 0.0)
    for _ in range(60):
        assert limit.wait_s(1, 0.0) == 0
        limit.take(1, 0.0)
    assert limit.wait_s(1, 0.0) == pytest.approx(1.0)
    assert limit.wait_s(1, 1.0) == pytest.approx(0.0)
    assert limit.wait_s(30, 1.0) == pytest.approx(29.0)


def test_an_estimate_is_settled_and_a_request_above_the_limit_needs_a_full_one(breaker: ModuleType):
    limit = breaker.MinuteLimit(600, 0.0)
    assert limit.wait_s(5000, 0.0) == 0
    limit.take(5000, 0.0)
    limit.take(100 - 5000, 0.0)  # it used only 100
    assert limit.wait_s(500, 0.0) == 0
    assert limit.wait_s(600, 0.0) == pytest.approx(10.0)
    assert breaker.MinuteLimit(None, 0.0).wait_s(10**9, 0.0) == 0
