"""Many observations at once are what they are one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from services.gateway.api.metrics import observe_all

pytestmark = pytest.mark.unit

BOUNDS = (0.001, 0.01, 0.1, 1.0)


def shown(values: list[float], together: bool) -> dict[tuple[str, str], float]:
    registry = CollectorRegistry()
    histogram = Histogram("t", "t", buckets=BOUNDS, registry=registry)
    if together:
        observe_all(histogram, np.array(values))
    else:
        for value in values:
            histogram.observe(value)
    (family,) = registry.collect()
    return {
        (s.name, s.labels.get("le", "")): s.value for s in family.samples if not s.name.endswith("_created")
    }


@given(st.lists(st.floats(0, 3) | st.sampled_from(BOUNDS), min_size=1, max_size=50))
def test_together_or_one_by_one(values):
    assert shown(values, True) == pytest.approx(shown(values, False))
