"""The band of a request."""

from __future__ import annotations

import pytest

from services.gateway.domain.llm.band import band_of
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("headers", "body", "band"),
    [
        ({}, {}, "normal"),
        ({b"x-tidegate-priority": b"High"}, {"service_tier": "flex"}, "high"),
        ({}, {"service_tier": "priority"}, "high"),
        ({}, {"service_tier": "flex"}, "low"),
        ({}, {"service_tier": "auto"}, "normal"),
        ({}, {"service_tier": ["x"]}, "normal"),
        ({b"priority": b"u=1"}, {}, "high"),
        ({b"priority": b"i, u=6"}, {}, "low"),
        ({b"priority": b"u=3, i"}, {}, "normal"),
        ({b"priority": b"u=4"}, {}, "normal"),
        ({b"priority": b"u=77"}, {}, "normal"),
        ({b"priority": b"u=6"}, {"service_tier": "default"}, "low"),
    ],
)
def test_bands(headers, body, band):
    assert band_of(headers, body) == band


def test_an_unknown_band():
    with pytest.raises(BadRequest, match="must be one of high, normal, low, got 'urgent'"):
        band_of({b"x-tidegate-priority": b"urgent"}, {})
