"""The gauges of rollouts: shown while they run, and removed after."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from services.router.adapters.rollout_metrics import RolloutMetrics

pytestmark = pytest.mark.unit


def harm(endpoint: str) -> float | None:
    labels = {"endpoint": endpoint, "metric": "errors"}
    return REGISTRY.get_sample_value("tidegate_router_canary_harm", labels)


def test_gauges_live_as_long_as_their_rollout() -> None:
    metrics = RolloutMetrics()
    metrics.show("digits", 5, {"errors": {"e_worse": 30.0, "roll_back_at": 60.0}})
    metrics.show("other", 5, {"errors": {"e_worse": 1.0, "roll_back_at": 60.0}})
    assert harm("digits") == 0.5
    assert REGISTRY.get_sample_value("tidegate_router_canary_share", {"endpoint": "digits"}) == 5
    metrics.keep({"other"})
    assert harm("digits") is None
    assert harm("other") == pytest.approx(1 / 60)
    metrics.keep(set())
