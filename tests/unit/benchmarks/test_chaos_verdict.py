"""The verdict on a run with kills sees each kind of loss."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.chaos.verdict import Evidence, inputs_of, judge, lines

pytestmark = pytest.mark.unit


def evidence(jobs: int = 3) -> Evidence:
    """A run in which all went well."""
    ids = [f"{number:032x}" for number in range(jobs)]
    return Evidence(
        jobs=jobs,
        told={number: {id_} for number, id_ in enumerate(ids)},
        records=[{"id": id_, "status": "succeeded", "attempts": 1} for id_ in ids],
        results={number: inputs_of(number) for number in range(jobs)},
        webhook_ids={id_: {f"msg_{id_}"} for id_ in ids},
        deliveries=Counter({f"msg_{id_}": 2 for id_ in ids}),
        forged=0,
        gauge=Counter({"0": 5, "unknown": 3}),
        gauge_last=0.0,
        ledger={"accepted": jobs, "over": {"succeeded": jobs, "failed": 0}},
    )


def missed(seen: Evidence) -> list[str]:
    return [bar.text for bar in judge(seen) if not bar.met]


def test_all_is_well():
    assert missed(evidence()) == []
    assert "MISS" not in lines(judge(evidence()))


def test_no_two_inputs_are_the_same():
    assert len({tuple(inputs_of(number)) for number in range(20_000)}) == 20_000


def test_a_job_that_was_told_two_ids():
    seen = evidence()
    seen.told = {**seen.told, 1: {*seen.told[1], "f" * 32}}
    assert any("under one id" in text for text in missed(seen))


def test_a_lost_record_and_one_too_many():
    seen = evidence()
    lost = seen.records.pop()
    assert any("name the same jobs" in text for text in missed(seen))
    seen.records += [lost, lost]
    assert any("name the same jobs" in text for text in missed(seen))
    seen.records[-1] = {**lost, "id": "e" * 32}
    assert any("name the same jobs" in text for text in missed(seen))


@pytest.mark.parametrize("wrong", [[0.0, 0.0, 0.0, 0.0], {"reason": "worker_lost"}, None])
def test_a_wrong_or_missing_result(wrong):
    seen = evidence()
    seen.results = {**seen.results, 2: wrong}
    assert missed(seen) == ["every result is right"]


def test_a_job_that_hangs():
    seen = evidence()
    seen.records[0]["status"] = "running"
    seen.ledger["over"]["succeeded"] -= 1
    assert missed(seen) == ["every job is over", "the store counts every job once: accepted, and over"]


@pytest.mark.parametrize("ids", [set(), {"msg_a", "msg_b"}])
def test_a_webhook_missing_or_under_two_ids(ids):
    seen = evidence()
    seen.webhook_ids = {**seen.webhook_ids, f"{1:032x}": ids}
    assert missed(seen) == ["every job has sent its webhook under exactly one webhook id"]
    seen = evidence()
    seen.forged = 1
    assert missed(seen) == ["every job has sent its webhook under exactly one webhook id"]


@pytest.mark.parametrize(("gauge", "last"), [({"0": 5, "above 0": 1}, 0.0), ({"0": 5}, 2.0), ({}, 0.0)])
def test_a_ledger_that_did_not_balance(gauge, last):
    seen = evidence()
    seen.gauge, seen.gauge_last = Counter(gauge), last
    assert missed(seen) == ["the ledger reads 0 whenever its sources are up, and at the end"]
