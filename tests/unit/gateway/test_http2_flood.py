"""How much useless work one client may cause."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.domain import http2_flood as patience
from services.gateway.domain.http2_flood import FloodGuard
from services.gateway.domain.message_weight import FIELDS, structure
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.triton_protocol import pb

pytestmark = pytest.mark.unit


def test_frames_that_do_no_work_are_counted_and_time_forgives():
    found = FloodGuard(0.0)
    assert not any(found.nuisance(0.0) for _ in range(2000))
    assert found.nuisance(0.0) == "too many frames that do no work"
    found = FloodGuard(0.0)
    for second in range(1, 100):
        assert not any(found.nuisance(float(second)) for _ in range(499))


def test_answers_earn_frames_that_acknowledge_them():
    found = FloodGuard(0.0)
    for _ in range(10_000):
        found.sent(100)
        assert not any(found.nuisance(0.0) for _ in range(4))


def test_pings_at_once_are_strikes_and_slow_ones_or_such_between_answers_are_not():
    slow, quick, answered = FloodGuard(0.0), FloodGuard(0.0), FloodGuard(0.0)
    assert not any(slow.ping(at * patience.PING_INTERVAL_S) for at in range(1000))
    assert [quick.ping(1.0) for _ in range(6)][-1] == "too_many_pings"
    for _ in range(1000):
        answered.sent(1)
        assert answered.ping(1.0) is None


def test_calls_may_be_cancelled_in_proportion_to_those_that_are_answered():
    found = FloodGuard(0.0)
    assert not any(found.reset() for _ in range(patience.RESETS))
    assert found.reset() == "too many cancelled calls"
    found.answered()
    assert not any(found.reset() for _ in range(3))


def test_bytes_for_calls_that_have_ended():
    found = FloodGuard(0.0)
    assert found.stray(patience.STRAY_BYTES) is None
    assert found.stray(1) is not None
    found.begun(1000)
    assert found.stray(500) is None


def request(**given):
    made = pb.ModelInferRequest(model_name="m", **given)
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    return made


def test_raw_tensors_are_no_structure():
    made = request()
    head = len(made.SerializeToString())
    made.raw_input_contents.extend([bytes(100_000), b"abc"])
    assert head < structure(made.SerializeToString()) < head + 12
    made.inputs[0].contents.fp32_contents.extend([1.0] * 1000)
    assert structure(made.SerializeToString()) > 4000


@pytest.mark.parametrize("tag", [b"\x2a\x00", b"\x3a\x00", b"\x22\x00", b"\x08\x01"])
def test_a_request_has_so_many_parts_and_no_more(tag):
    structure(tag * FIELDS)
    with pytest.raises(BadRequest, match="more than 4096"):
        structure(tag * (FIELDS + 1))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_what_is_no_protobuf_is_all_structure_or_less(data):
    assert 0 <= structure(data) <= len(data)
