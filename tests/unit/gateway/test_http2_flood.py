"""Limits for the useless work that one HTTP/2 client may cause."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.domain import http2_flood
from services.gateway.domain.http2_flood import FloodGuard
from services.gateway.domain.message_weight import FIELDS, structure
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.unit


def test_frames_without_work_are_counted_and_earned_again_over_time():
    guard = FloodGuard(0.0)
    assert not any(guard.useless_frame(0.0) for _ in range(2000))
    assert guard.useless_frame(0.0) == "the client sends too many frames that belong to no request"
    guard = FloodGuard(0.0)
    for second in range(1, 100):
        assert not any(guard.useless_frame(float(second)) for _ in range(499))


def test_answers_earn_frames_that_acknowledge_them():
    guard = FloodGuard(0.0)
    for _ in range(10_000):
        guard.sent(100)
        assert not any(guard.useless_frame(0.0) for _ in range(4))


def test_only_quick_pings_between_no_answers_are_strikes():
    slow, quick, answered = FloodGuard(0.0), FloodGuard(0.0), FloodGuard(0.0)
    assert not any(slow.ping(at * http2_flood.PING_INTERVAL_S) for at in range(1000))
    assert [quick.ping(1.0) for _ in range(6)][-1] == "too_many_pings"
    for _ in range(1000):
        answered.sent(1)
        assert answered.ping(1.0) is None


def test_cancelled_calls_are_limited_in_proportion_to_answered_ones():
    guard = FloodGuard(0.0)
    assert not any(guard.reset() for _ in range(http2_flood.RESETS))
    assert guard.reset() == "the client cancels too many calls"
    guard.answered()
    assert not any(guard.reset() for _ in range(3))


def test_bytes_for_calls_that_have_ended():
    guard = FloodGuard(0.0)
    assert guard.late_data(http2_flood.LATE_BYTES) is None
    assert guard.late_data(1) is not None
    guard.call_began(1000)
    assert guard.late_data(500) is None


def request(**given):
    made = pb.ModelInferRequest(model_name="m", **given)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return made


def test_raw_tensors_do_not_count_as_structure():
    made = request()
    head = len(made.SerializeToString())
    made.raw_input_contents.extend([bytes(100_000), b"abc"])
    assert head < structure(made.SerializeToString()) < head + 12
    made.inputs[0].contents.fp32_contents.extend([1.0] * 1000)
    assert structure(made.SerializeToString()) > 4000


@pytest.mark.parametrize("tag", [b"\x2a\x00", b"\x3a\x00", b"\x22\x00", b"\x08\x01"])
def test_the_number_of_fields_is_limited(tag):
    structure(tag * FIELDS)
    with pytest.raises(BadRequest, match="more than 4096"):
        structure(tag * (FIELDS + 1))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_malformed_protobuf_counts_as_structure(data):
    assert 0 <= structure(data) <= len(data)
