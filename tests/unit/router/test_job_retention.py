"""How many job records are removed if their store is full."""

from __future__ import annotations

import pytest

from services.router.domain.job_retention import Retention, StoreSize


def retention(limit: int) -> Retention:
    return Retention(keep_s=86_400, count=1_000_000, bytes=limit, at_least_s=300)


@pytest.mark.parametrize(
    ("used", "records", "over", "surplus"),
    [
        (1_000, 10, 10, 0),
        (1_001, 10, 10, 1),
        (2_000, 20, 20, 11),
        (2_000, 20, 4, 4),
        (2_000, 0, 0, 0),
    ],
)
def test_enough_records_are_removed_to_reach_the_limit(used, records, over, surplus):
    assert retention(1_000).surplus(StoreSize(used, records, over)) == surplus


def test_without_a_limit_nothing_is_removed():
    assert retention(0).surplus(StoreSize(10**12, 10**6, 10**6)) == 0
