"""Metrics: observing many values at once, and the labels."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from services.gateway.api.metrics import ANSWERED, OUTSTANDING, TOTAL, GatewayMetrics, observe_all
from services.gateway.application.inference.core import Timing
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.routing import parse_table
from services.router.domain.watch.window import quantile_s
from tests.integration.gateway.process import make_table
from tidegate.kernel.errors import DeadlinePassed
from tidegate.kernel.protocol.traffic import ROWS
from tidegate.kernel.protocol.traffic_histograms import dense

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
def test_observing_together_equals_observing_one_by_one(values):
    assert shown(values, True) == pytest.approx(shown(values, False))


def labels_of(metric, name: str) -> set[str]:
    (family,) = metric.collect()
    return {sample.labels[name] for sample in family.samples}


def table_of(deployment: str, endpoint: str):
    raw = make_table(deployment)
    return parse_table(raw | {"endpoints": {endpoint: raw["endpoints"]["digits"]}})


def test_only_names_of_the_table_are_labels():
    """For every reason: a caller without a credential can send any name."""
    table = table_of("known-1", "known")
    metrics = GatewayMetrics(lambda: table)
    before = labels_of(ANSWERED, "model")
    for reason in (
        "unauthorized",
        "forbidden",
        "bad_request",
        "payload_too_large",
        "not_found",
        "caller_gone",
    ):
        for number in range(50):
            metrics.refused(f"made-up-{number}", reason)
        metrics.refused("known", reason)
        metrics.refused("", reason)
    assert labels_of(ANSWERED, "model") - before <= {"known", "unknown", ""}


def test_without_a_table_no_name_is_a_label():
    GatewayMetrics().refused("made-up", "no_routes")
    assert "made-up" not in labels_of(ANSWERED, "model")


def test_labels_that_leave_the_table_are_removed():
    tables = [table_of("gone-1", "gone"), table_of("stays-1", "stays")]
    metrics = GatewayMetrics(lambda: tables[0])
    metrics.answered("gone", "gone-1", Timing(), 0.1)
    metrics.report({})
    assert "gone" in labels_of(ANSWERED, "model")
    assert "gone-1" in labels_of(TOTAL, "deployment")
    del tables[0]
    metrics.report({})
    assert "gone" not in labels_of(ANSWERED, "model")
    assert "gone-1" not in labels_of(TOTAL, "deployment") | labels_of(OUTSTANDING, "deployment")


def test_a_request_that_the_engine_refuses_is_no_failure_of_a_canary():
    raw = make_table("canary-a")
    endpoints = {"chat": raw["endpoints"]["digits"] | {"compared": True}}
    table = parse_table(raw | {"endpoints": endpoints})
    metrics = GatewayMetrics(lambda: table)
    metrics.report({})
    for status, failures in ((400, 0), (429, 0), (502, 1)):
        error = EngineRefused(status, b"{}")
        error.deployment = "canary-a"
        metrics.failed("chat", error)
        counted = metrics.variants.report().get("chat", {})
        assert sum(each.failed for each in counted.values()) == failures


@pytest.mark.parametrize(("cut_after_s", "failures", "answers"), [(0.0, 1, 0), (0.05, 0, 1)])
def test_a_deadline_that_the_caller_made_shorter_is_no_failure_of_a_canary(cut_after_s, failures, answers):
    raw = make_table("canary-b")
    endpoints = {"chat": raw["endpoints"]["digits"] | {"compared": True}}
    table = parse_table(raw | {"endpoints": endpoints})
    metrics = GatewayMetrics(lambda: table)
    metrics.report({})
    error = DeadlinePassed("the deadline passed")
    error.deployment, error.cut_after_s = "canary-b", cut_after_s
    metrics.failed("chat", error)
    counts = metrics.variants.report()["chat"]["canary-b"]
    assert (counts.failed, sum(counts.times)) == (failures, answers)


async def test_the_first_answer_of_a_stream_is_counted_with_the_parts_of_its_time():
    """Without them, a diagnosis of a slow language model would always blame the callers."""
    table = table_of("digits-v1", "digits")
    metrics = GatewayMetrics(lambda: table)
    (route,) = table.endpoints["digits"].targets
    timing = Timing(decode=0.001, wait=0.2, compute=0.5)

    async def answers() -> AsyncGenerator[Any]:
        for _ in range(3):
            yield SimpleNamespace(route=route, request=None, timing=timing)

    async for _ in metrics.watch("digits", time.perf_counter() - 1.0, answers()):
        pass
    counts = dense(metrics.traffic.report()["digits"].times["digits-v1"])
    assert counts.sum(axis=1).tolist() == [1] * len(ROWS)
    seconds = dict(zip(ROWS, (quantile_s(row, 0.5) for row in counts), strict=True))
    assert seconds["total"] == pytest.approx(1.0, rel=0.1)
    assert seconds["transit"] == pytest.approx(0.3, rel=0.1)
    assert seconds["wait"] == pytest.approx(0.2, rel=0.1)
    assert seconds["compute"] == pytest.approx(0.5, rel=0.1)
