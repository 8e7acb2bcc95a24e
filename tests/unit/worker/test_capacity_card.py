"""The figures of a capacity card."""

from __future__ import annotations

import pytest

from services.worker.domain.capacity_card import figures, requests_per_s, sizes


@pytest.mark.parametrize(
    ("largest", "measured"), [(0, [1]), (1, [1]), (4, [1, 4]), (8, [1, 8]), (64, [1, 8, 64])]
)
def test_one_row_a_few_and_the_largest_batch_are_measured(largest, measured):
    assert sizes(largest) == measured


def test_percentiles_are_measured_values_and_the_rate_counts_rows():
    found = figures(8, [0.001] * 98 + [0.010, 0.020], wall_s=0.5)
    assert (found.p50_ms, found.p99_ms) == (1.0, 10.0)
    assert found.rows_per_s == 1600.0
    assert figures(1, [0.002], 0.002).p99_ms == 2.0


def test_the_best_batch_size_gives_the_requests_per_second():
    batches = [figures(1, [0.001] * 10, 0.01), figures(8, [0.002] * 10, 0.02)]
    assert requests_per_s(batches) == 4000.0
    assert requests_per_s([]) is None
