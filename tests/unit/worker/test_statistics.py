"""How requests are counted, and how Triton's counts are divided among them."""

from __future__ import annotations

import pytest

from services.worker.domain.statistics import RequestCounts, since
from tidegate.kernel.protocol import statistics

pytestmark = pytest.mark.unit

# Two calls, as Triton counts them.
TRITON = {
    "execution_count": 2,
    "success.count": 2,
    "success.ns": 1_000,
    "queue.ns": 100,
    "compute_input.ns": 20,
    "compute_infer.ns": 600,
    "compute_output.ns": 40,
    "batch.3.compute_infer.count": 2,
    "batch.3.compute_infer.ns": 600,
    "cache_hit.count": 5,
    "cache_hit.ns": 70,
}


def test_requests_that_share_calls_are_counted():
    counts = RequestCounts()
    counts.add_success(requests=3, rows=5, waited_s=2e-6, call_s=1e-6)
    counts.add_success(requests=1, rows=1, waited_s=0.0, call_s=1e-6)
    counts.add_failure(requests=2, spent_s=3e-6)
    assert counts.take(TRITON) == {
        "inference_count": 6,
        "execution_count": 2,
        "success.count": 4,
        "success.ns": 6_000,
        "fail.count": 2,
        "fail.ns": 6_000,
        "queue.count": 4,
        "queue.ns": 2_000 + 100 * 4 // 2,
        "compute_input.count": 4,
        "compute_input.ns": 40,
        "compute_infer.count": 4,
        "compute_infer.ns": 1_200,
        "compute_output.count": 4,
        "compute_output.ns": 80,
        "batch.3.compute_infer.count": 2,
        "batch.3.compute_infer.ns": 600,
        "cache_hit.count": 5,
        "cache_hit.ns": 70,
    }
    assert counts.take({}) == {}, "the counts were reset"


def test_without_counts_of_triton():
    counts = RequestCounts()
    counts.add_success(requests=2, rows=2, waited_s=0.0, call_s=1e-6)
    found = counts.take({})
    assert (found["compute_infer.count"], found["compute_infer.ns"]) == (2, 2_000)
    assert "compute_input.ns" not in found
    assert "execution_count" not in found


def test_counts_that_were_put_back_are_taken_again():
    counts = RequestCounts()
    counts.add_success(requests=1, rows=1, waited_s=0.0, call_s=1e-6)
    counts.put_back(counts.take(TRITON))
    counts.add_success(requests=1, rows=1, waited_s=0.0, call_s=1e-6)
    found = counts.take(TRITON)
    assert (found["success.count"], found["compute_infer.count"], found["execution_count"]) == (2, 2, 4)
    assert found["compute_infer.ns"] == 300 + 300


@pytest.mark.parametrize(
    ("before", "now", "added"),
    [
        ({}, {"a": 3}, {"a": 3}),
        ({"a": 3}, {"a": 5, "b": 1}, {"a": 2, "b": 1}),
        ({"a": 3}, {"a": 3}, {"a": 0}),
        ({"a": 3}, {"a": 1}, {"a": 1}),
    ],
)
def test_since(before, now, added):
    """A restarted Triton counts from 0."""
    assert since(before, now) == added


def test_shown():
    counts = {
        "last_inference": 7,
        "inference_count": 6,
        "execution_count": 2,
        "success.count": 4,
        "success.ns": 9,
        "batch.12.compute_input.count": 1,
        "batch.3.compute_infer.ns": 600,
    }
    found = statistics.shown("digits", "2", counts)
    assert (found["name"], found["version"], found["last_inference"]) == ("digits", "2", 7)
    assert (found["inference_count"], found["execution_count"]) == (6, 2)
    assert found["inference_stats"]["success"] == {"count": 4, "ns": 9}
    assert found["inference_stats"]["fail"] == {"count": 0, "ns": 0}
    assert [batch["batch_size"] for batch in found["batch_stats"]] == [3, 12]
    assert found["batch_stats"][0]["compute_infer"] == {"count": 0, "ns": 600}
