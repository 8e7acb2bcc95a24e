"""The obstacles of a canary, as the autoscaler reports them."""

from __future__ import annotations

from typing import Any

import pytest

from services.router.domain.canary_health import LOAD_PATIENCE_S, CanaryHealth, health_of

pytestmark = pytest.mark.unit


def status(kind: str, reason: str = "", message: str = "", *, ok: bool = False) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "ok": ok, "reason": reason, "message": message, "at": 100.0}]}


@pytest.mark.parametrize("given", [(1, status("Loaded")), (0, None)])
def test_a_ready_or_unknown_canary_has_no_obstacle(given: tuple[int, Any]) -> None:
    assert health_of("v2", *given, 1000.0) == CanaryHealth()


def test_a_model_that_fails_to_load_is_broken_after_a_while() -> None:
    fails = status("Loaded", "LoadFailed", "the weights are missing (2 failed starts)")
    early = health_of("v2", 0, fails, 100.0 + LOAD_PATIENCE_S - 1)
    assert (early.broken, early.waits) == ("", "v2 does not start: the weights are missing (2 failed starts)")
    assert health_of("v2", 0, fails, 100.0 + LOAD_PATIENCE_S).broken.endswith("(2 failed starts)")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            status("Placeable", "HostFull", "the host is full"),
            "v2 has no ready replica: the host is full. Or replace",
        ),
        (status("Ready", "Paused", ok=True), "held at 0 replicas"),
        (status("Ready", "Starting"), "no ready replica yet; `tidegate why v2`"),
    ],
)
def test_a_canary_that_waits_says_for_what(given: dict[str, Any], words: str) -> None:
    found = health_of("v2", 0, given, 1000.0)
    assert words in found.waits
    assert not found.broken
