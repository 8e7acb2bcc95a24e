"""The place of a request in its queue."""

from __future__ import annotations

import pytest

from services.gateway.domain.llm.queue_place import QueuePlace, place

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"before": 0, "left": 0, "ready": 1}, QueuePlace(0, 0.0, False)),
        ({"before": 10, "left": 0, "ready": 1}, QueuePlace(6, None, False)),
        ({"before": 10, "left": 2, "ready": 1}, QueuePlace(4, 16.0, False)),
        ({"before": 10, "left": 2, "ready": 2}, QueuePlace(0, 0.0, False)),
        ({"before": 10, "left": 50, "ready": 1}, QueuePlace(0, 0.0, False)),
        ({"before": 3, "left": 0, "ready": 0}, QueuePlace(3, None, True)),
        ({"before": 3, "left": 0, "ready": 0, "start_ms": 2500.0}, QueuePlace(3, 2.5, True)),
    ],
)
def test_places(given, expected):
    assert place(**{"waited_s": 8.0, "room": 4, "start_ms": None, **given}) == expected


def test_comments():
    assert QueuePlace(3, None, False).comment() == b": x-tidegate-queue position=3\n\n"
    assert QueuePlace(3, 2.54, True).comment() == b": x-tidegate-queue position=3 wait_s=2.5 state=waking\n\n"
