"""Feedback through a real gateway: accepted, refused, counted once, and on disk in the store of jobs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from redis import Redis

from services.gateway.domain.feedback_ids import AnswerFacts, FeedbackIds
from tests.integration.gateway.process import make_table
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.store.feedback import MOST_NAMES, START, FeedbackStore
from tidegate.kernel.store.live import ROUTES

pytestmark = pytest.mark.integration

IDS = FeedbackIds("token")
HOUR_US = 3_600_000_000


@pytest.fixture
async def feedback(jobs_url) -> AsyncIterator[FeedbackStore]:
    found = FeedbackStore.connect(jobs_url)
    yield found
    await found.close()


@pytest.fixture
def collecting(gateway, valkey_url):
    """Let the endpoint ``digits`` collect feedback."""
    table: dict[str, Any] = make_table(gateway.deployment)
    table["endpoints"]["digits"]["feedback"] = True
    with Redis.from_url(valkey_url) as redis:
        redis.set(ROUTES, orjson.dumps({**table, "n": 2}))


def id_of(rid: str, age_us: int = 0, owner: str = "anonymous") -> str:
    at = int(time.time() * 1e6) - age_us
    return IDS.make(AnswerFacts("digits", "digits-v1", "1", rid, at, True, "", IDS.owner(owner))).decode()


async def test_each_item_gets_its_answer(http, feedback):
    before = await feedback.end()
    good = id_of("a")
    items = [
        {"request_id": good, "score": 0.5, "label": "cat"},
        {"request_id": good, "score": 0.7},
        {"request_id": good, "reward": 2, "at": "2026-01-02T03:04:05Z"},
        {"request_id": "0123456789abcdef", "score": 1},
        {"request_id": id_of("b", owner="k2"), "score": 1},
        {"request_id": id_of("c", age_us=8 * 24 * HOUR_US), "score": 1},
        {"request_id": good, "score": "high"},
        {"idempotency_key": "nobody's", "score": 1},
    ]
    answer = await http.post("/v1/feedback", json=items)
    assert answer.status_code == 202, answer.text
    told = answer.json()
    assert [each["status"] for each in told["items"]] == [
        "accepted", "duplicate", "accepted", "unknown", "forbidden", "expired", "invalid", "unknown",
    ]  # fmt: skip
    assert (told["accepted"], told["duplicate"], told["refused"]) == (2, 1, 5)
    assert all(each["message"] for each in told["items"] if each["status"] not in ("accepted",))
    records = [record for _, record in await feedback.read(before)]
    assert [(each.metric, each.value, each.label) for each in records] == [
        ("score", 0.5, None), ("label", None, "cat"), ("reward", 2.0, None),
    ]  # fmt: skip
    assert records[2].at == 1_767_323_045_000
    assert {each.request_id for each in records} == {"a"}


async def test_an_answer_has_a_few_metrics_with_names_of_the_caller(http):
    id_ = id_of("names")
    items = [{"request_id": id_, "metric": f"m{n}", "value": 1} for n in range(MOST_NAMES + 2)]
    told = (await http.post("/v1/feedback", json=[*items, items[0], {"request_id": id_, "score": 1}])).json()
    expected = ["accepted"] * MOST_NAMES + ["invalid"] * 2 + ["duplicate", "accepted"]
    assert [each["status"] for each in told["items"]] == expected
    assert "use fewer" in told["items"][MOST_NAMES]["message"]


async def test_lines_and_single_items(http):
    lines = [orjson.dumps({"request_id": id_of("d"), "score": 1}), b"{broken", b""]
    answer = await http.post(
        "/v1/feedback", content=b"\n".join(lines), headers={"Content-Type": "application/x-ndjson"}
    )
    assert [each["status"] for each in answer.json()["items"]] == ["accepted", "invalid"]
    single = {"request_id": id_of("e"), "score": 1}
    assert (await http.post("/v1/feedback", json=single)).json()["accepted"] == 1
    assert (await http.post("/v1/feedback", json=single)).json()["duplicate"] == 1
    for item, status, reason in (
        ({"request_id": "x", "score": 1}, 404, "unknown_answer"),
        ({"request_id": id_of("f", owner="k2"), "score": 1}, 403, "foreign_answer"),
        ({"request_id": id_of("f", age_us=8 * 24 * HOUR_US), "score": 1}, 404, "expired_answer"),
        ({"request_id": "x"}, 400, "bad_request"),
    ):
        answer = await http.post("/v1/feedback", json=item)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert (await http.post("/v1/feedback", json=[])).status_code == 400
    assert (await http.post("/v1/feedback", json=[single] * 1001)).status_code == 413


async def test_the_scope_operate_reports_about_every_key(http):
    item = {"request_id": id_of("g", owner="k2"), "score": 1}
    answer = await http.post("/v1/feedback", json=item, headers={"Authorization": "Bearer token"})
    assert answer.json()["accepted"] == 1


async def test_a_job_is_known_by_its_id_and_by_its_key(http, worker, collecting, until, feedback):
    body = {"model": "digits", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}

    async def submitted() -> dict[str, Any] | None:
        key = f"key-{time.time_ns()}"
        answer = await http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
        found = answer.json()
        if "x-feedback-id" not in answer.headers:
            return None  # the new table is still on its way
        assert answer.headers["x-feedback-id"] == found["feedback_id"]
        return found | {"key": key}

    job = await until(submitted)
    before = await feedback.end()
    items = [
        {"request_id": job["id"], "score": 1},
        {"idempotency_key": job["key"], "reward": 1},
        {"request_id": job["feedback_id"], "score": 2},
    ]
    told = (await http.post("/v1/feedback", json=items)).json()
    assert [each["status"] for each in told["items"]] == ["accepted", "accepted", "duplicate"]
    records = [record for _, record in await feedback.read(before)]
    assert {(each.endpoint, each.deployment) for each in records} == {("digits", worker.deployment)}


async def test_a_reader_that_is_too_slow_learns_it(jobs_url):
    store = FeedbackStore.connect(jobs_url)
    store._kept = 100
    at = int(time.time() * 1e3)

    def records(begin: int, end: int) -> list[tuple[str, FeedbackRecord]]:
        return [
            (f"slow {n}", FeedbackRecord("digits", "v1", "1", f"slow {n}", "score", float(n), None, at, at))
            for n in range(begin, end)
        ]

    await store.add(records(0, 10), 1000)
    position = (await store.read(START, 1))[0][0]
    assert not await store.lost(START)
    assert not await store.lost(position)
    await store.add(records(10, 1000), 1000)
    assert await store.lost(position)
    newest = await store.read(START, 10_000)
    assert 100 <= len(newest) < 400
    assert newest[-1][1].value == 999.0
    assert not await store.lost(newest[0][0])
    await store.close()
