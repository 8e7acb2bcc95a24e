"""The API of accepted jobs: status, result, cancel, events, list, retry, and access to them."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from tidegate.kernel.protocol.jobs import read_id

pytestmark = pytest.mark.integration

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
INFER = "/v2/models/digits/infer"
ASYNC = {"Prefer": "respond-async"}


async def submit(http, **headers):
    answer = await http.post(INFER, json=BODY, headers=ASYNC | headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def ended(http, id_):
    answer = await http.get(f"/v1/jobs/{id_}", headers={"Prefer": "wait=100"})
    assert answer.status_code == 200
    return answer.json()


def fail(_):
    raise ValueError("the model said no")


def events_of(text):
    """Return the events of a stream: (id, event, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], orjson.loads(fields["data"])))
    return found


async def test_position_and_estimated_start_of_queued_jobs(http, worker):
    worker.open.clear()
    jobs = [await submit(http, **{"X-Job-Priority": "low"}) for _ in range(3)]
    assert [job["position"] for job in jobs] == [0, 1, 2]
    shown = [(await http.get(job["urls"]["status"])).json() for job in jobs]
    assert [job["position"] for job in shown] == [0, 1, 2]
    assert {job["status"] for job in shown} == {"queued"}
    assert {job["estimated_start"] for job in shown} == {None}
    worker.open.set()
    for job in jobs:
        assert (await ended(http, job["id"]))["position"] is None


async def test_a_result_before_the_end_is_a_202(http, worker):
    worker.open.clear()
    job = await submit(http)
    answer = await http.get(job["urls"]["result"])
    assert answer.status_code == 202
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["id"] == job["id"]
    waiting = asyncio.create_task(http.get(job["urls"]["result"], headers={"Prefer": "wait=100"}))
    worker.open.set()
    assert (await waiting).json()["outputs"][0]["data"] == [1, 2]


async def test_the_times_of_a_job(http, worker):
    done = await ended(http, (await submit(http))["id"])
    assert done["created_at"] <= done["started_at"]
    assert done["started_at"] <= done["finished_at"] <= done["expires_at"]
    assert done["timing"]["compute_ms"] == 0.2
    assert done["timing"]["worker_wait_ms"] == 0.1


async def test_the_result_of_a_failed_job_has_the_status_of_its_error(http, worker):
    worker.answer = fail
    job = await ended(http, (await submit(http))["id"])
    assert job["status"] == "failed"
    assert job["error"] == {"reason": "model_failed", "message": "the model said no"}
    answer = await http.get(job["urls"]["result"])
    assert answer.status_code == 500
    assert answer.json()["reason"] == "model_failed"
    waited = await http.post(INFER, json=BODY, headers={"Prefer": "wait=100"})
    assert (waited.status_code, waited.json()["reason"]) == (500, "model_failed")


async def test_a_failed_job_is_retried_as_a_new_one(http, worker):
    worker.answer = fail
    first = await ended(http, (await submit(http, **{"X-Job-Priority": "high"}))["id"])
    worker.answer = worker.echo
    answer = await http.post(first["urls"]["retry"])
    assert answer.status_code == 202
    second = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{second['id']}"
    assert second["id"] != first["id"]
    assert second["retry_of"] == first["id"]
    assert second["priority"] == "high"
    done = await ended(http, second["id"])
    assert done["status"] == "succeeded"
    assert (await http.get(done["urls"]["result"])).json()["outputs"][0]["data"] == [1, 2]
    again = await http.post(done["urls"]["retry"])
    assert (again.status_code, again.json()["reason"]) == (409, "conflict")


async def test_a_large_failed_job_is_retried(http, worker):
    worker.answer = fail
    values = [float(n) for n in range(16)]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [8, 2], "data": values}]}
    first = (await http.post(INFER, json=body, headers=ASYNC)).json()
    await ended(http, first["id"])
    worker.answer = worker.echo
    second = (await http.post(first["urls"]["retry"])).json()
    await ended(http, second["id"])
    assert (await http.get(second["urls"]["result"])).json()["outputs"][0]["data"] == values


async def test_a_cancelled_job_never_runs(http, worker, until):
    worker.open.clear()
    job = await submit(http)
    answer = await http.delete(job["urls"]["cancel"])
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    await until(lambda: read_id(job["id"]) in worker.cancelled)
    worker.open.set()
    result = await http.get(job["urls"]["result"])
    assert (result.status_code, result.json()["reason"]) == (409, "cancelled")
    after = await submit(http)
    await ended(http, after["id"])
    assert read_id(job["id"]) not in worker.taken
    retry = await http.post(job["urls"]["retry"])
    assert (retry.status_code, retry.json()["reason"]) == (409, "request_gone")
    assert f"only failed jobs can be retried; job {job['id']} was cancelled" in retry.json()["error"]


async def test_cancelling_a_finished_job_changes_nothing(http, worker):
    job = await ended(http, (await submit(http))["id"])
    answer = await http.delete(job["urls"]["cancel"])
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")


async def test_an_expired_job_says_so(http, worker, store):
    worker.open.clear()
    job = await submit(http, **{"X-Job-TTL": "1"})
    await store.expire(2**45, 100)
    answer = await http.get(job["urls"]["result"])
    assert (answer.status_code, answer.json()["reason"]) == (504, "expired")


async def test_events_of_a_job_up_to_its_end(http, worker):
    worker.open.clear()
    job = await submit(http)
    stream = asyncio.create_task(http.get(job["urls"]["events"]))
    await asyncio.sleep(0.05)
    worker.open.set()
    answer = await stream
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events_of(answer.text)
    numbers = [id_ for id_, _, _ in found]
    assert numbers == sorted(set(numbers))
    assert [event for _, event, _ in found] == ["queued", "running", "succeeded"]
    running = found[1][2]
    assert (running["worker"], running["attempt"]) == ("w1", 1)


async def test_events_resume_after_the_last_one_seen(http, worker):
    job = await ended(http, (await submit(http))["id"])
    rest = await http.get(job["urls"]["events"], headers={"Last-Event-ID": "1"})
    found = events_of(rest.text)
    assert [event for _, event, _ in found] == ["running", "succeeded"]
    over = await http.get(job["urls"]["events"], headers={"Last-Event-ID": str(found[-1][0])})
    assert over.status_code == 204
    wrong = await http.get(job["urls"]["events"], headers={"Last-Event-ID": "x"})
    assert wrong.status_code == 400


async def test_the_list_has_filters_and_pages(http, worker):
    ids = [(await submit(http))["id"] for _ in range(5)]
    for id_ in ids:
        await ended(http, id_)
    newest = sorted(ids, reverse=True)
    page = (await http.get("/v1/jobs", params={"limit": 2})).json()
    assert [item["id"] for item in page["items"]] == newest[:2]
    following = (await http.get("/v1/jobs", params={"limit": 2, "cursor": page["next"]})).json()
    assert [item["id"] for item in following["items"]] == newest[2:4]
    for given, expected in (
        ({"status": "succeeded", "endpoint": "digits", "limit": 5}, newest),
        ({"status": "queued"}, []),
        ({"endpoint": "other"}, []),
        ({"batch": "00" * 16}, []),
    ):
        found = (await http.get("/v1/jobs", params=given)).json()
        assert [item["id"] for item in found["items"]] == expected
    for wrong in ({"status": "accepting"}, {"cursor": "x"}, {"limit": 0}):
        assert (await http.get("/v1/jobs", params=wrong)).status_code == 400


@pytest.mark.parametrize("id_", ["0" * 32, "nothing", "0" * 31 + "G"])
async def test_unknown_jobs_are_not_found(http, id_):
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/result"),
        ("GET", "/events"),
        ("POST", "/retry"),
    ):
        answer = await http.request(method, f"/v1/jobs/{id_}{path}")
        assert (answer.status_code, answer.json()["reason"]) == (404, "not_found")


async def test_a_job_of_another_caller_is_not_found(gateway, http, worker):
    job = await ended(http, (await submit(http))["id"])
    gateway.jobs.hset(b"tidegate:job:r:" + (read_id(job["id"]) or b""), "principal", "somebody")
    for path in ("status", "result", "events"):
        assert (await http.get(job["urls"][path])).status_code == 404
    assert (await http.delete(job["urls"]["cancel"])).status_code == 404
