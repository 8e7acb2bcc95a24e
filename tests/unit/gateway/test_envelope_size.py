"""How many requests share an envelope."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain.envelope_size import (
    MAX_BYTES,
    MAX_FRAMES,
    QUANTUM_MS,
    frames_per_envelope,
    split,
)
from services.gateway.domain.replica_fleet import UNKNOWN_FLEET, ReplicaFleet

pytestmark = pytest.mark.unit

sizes = st.lists(st.integers(0, MAX_BYTES * 2) | st.integers(0, 2000), max_size=60)


@given(sizes, st.integers(1, MAX_FRAMES))
def test_every_frame_leaves_once_and_in_order(frames, most):
    ranges = list(split(frames, most))
    assert [at for start, end in ranges for at in range(start, end)] == list(range(len(frames)))
    for start, end in ranges:
        assert 1 <= end - start <= most
        assert sum(frames[start:end]) <= MAX_BYTES or end - start == 1


@given(sizes, st.integers(1, MAX_FRAMES))
def test_no_envelope_closes_early(frames, most):
    """The next frame would not fit."""
    ranges = list(split(frames, most))
    for (start, end), (after, _) in pairwise(ranges):
        assert end == after
        assert end - start == most or sum(frames[start : end + 1]) > MAX_BYTES


def test_examples():
    assert list(split([], 4)) == []
    assert list(split([1] * 5, 2)) == [(0, 2), (2, 4), (4, 5)]
    assert list(split([1, MAX_BYTES + 1, 1], 9)) == [(0, 1), (1, 2), (2, 3)]
    assert list(split([MAX_BYTES - 1, 1, 1], 9)) == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("waiting", "fleet", "most"),
    [
        (100, UNKNOWN_FLEET, 1),
        (100, ReplicaFleet(3, None), 1),
        (100, ReplicaFleet(0, 1.0), 1),
        (100, ReplicaFleet(1, 20.0), 1),
        (100, ReplicaFleet(1, 1.0), 5),
        (100, ReplicaFleet(1, 0.05), 100),
        (100, ReplicaFleet(4, 0.05), 25),
        (101, ReplicaFleet(4, 0.05), 26),
        (3, ReplicaFleet(4, 0.05), 1),
        (10_000, ReplicaFleet(1, 0.0), MAX_FRAMES),
        (0, ReplicaFleet(1, 0.1), 1),
    ],
)
def test_frames_per_envelope(waiting, fleet, most):
    assert frames_per_envelope(waiting, fleet) == most


@given(st.integers(0, 100_000), st.integers(1, 500), st.floats(0, 1e5))
def test_no_envelope_holds_more_than_a_replicas_share(waiting, ready, request_ms):
    most = frames_per_envelope(waiting, ReplicaFleet(ready, request_ms))
    assert 1 <= most <= MAX_FRAMES
    if most > 1:
        assert most * request_ms <= QUANTUM_MS * 1.001
        assert (most - 1) * ready < waiting, "a ready replica would get nothing"
