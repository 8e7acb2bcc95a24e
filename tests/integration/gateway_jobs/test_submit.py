"""The submission of jobs: the 202, waiting, idempotency keys, and refusals."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import orjson
import pytest

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import read_id
from tidegate.kernel.protocol.tenant import caller_of, endpoint_of

pytestmark = pytest.mark.integration

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
INFER = "/v2/models/digits/infer"
ASYNC = {"Prefer": "respond-async"}


async def ended(http, id_):
    """Return the job's document when it has ended."""
    answer = await http.get(f"/v1/jobs/{id_}", headers={"Prefer": "wait=100"})
    assert answer.status_code == 200
    return answer.json()


async def test_an_inference_call_that_prefers_it_becomes_a_job(http, worker):
    worker.open.clear()
    answer = await http.post(INFER, json=BODY, headers=ASYNC)
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "respond-async"
    job = answer.json()
    assert re.fullmatch(r"[0-9a-f]{32}", job["id"])
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["urls"]["status"]
    assert job["status"] == "queued"
    assert job["position"] == 0
    assert (job["endpoint"], job["model"], job["version"]) == ("digits", "digits", 1)
    worker.open.set()
    done = await ended(http, job["id"])
    assert done["status"] == "succeeded"
    assert done["attempts"] == 1
    assert done["worker"] == "w1"
    result = await http.get(job["urls"]["result"])
    assert result.status_code == 200
    assert result.json()["outputs"][0]["data"] == [1, 2]
    assert result.json()["model_name"] == "digits"


async def test_a_submitted_job_with_all_options(http, worker):
    body = BODY | {
        "model": "digits",
        "version": 1,
        "id": "mine",
        "priority": "high",
        "ttl_s": 60,
        "webhook": "https://example.org/hook",
        "metadata": {"order": 7},
    }
    answer = await http.post("/v1/jobs", json=body)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["priority"], job["webhook"], job["metadata"]) == ("high", body["webhook"], {"order": 7})
    done = await ended(http, job["id"])
    assert done["status"] == "succeeded"
    result = (await http.get(job["urls"]["result"])).json()
    assert result["id"] == "mine"
    (frame,) = [frame for frame in worker.frames if frame.id.hex() == job["id"]]
    assert (caller_of(frame.tenant), endpoint_of(frame.tenant)) == ("anonymous", "digits")
    assert frame.attempt == 0


async def test_options_of_an_inference_call_are_headers(http, worker):
    headers = ASYNC | {"X-Job-Priority": "low", "X-Job-TTL": "5", "X-Job-Webhook": "http://example.org/"}
    job = (await http.post(INFER, json=BODY, headers=headers)).json()
    assert (job["priority"], job["webhook"]) == ("low", "http://example.org/")


async def test_a_caller_that_waits_long_enough_gets_the_result(http, worker):
    answer = await http.post(INFER, json=BODY, headers={"Prefer": "wait=100"})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=100"
    assert answer.json()["outputs"][0]["data"] == [1, 2]
    path = answer.headers["content-location"]
    assert (await http.get(path)).json() == answer.json()


async def test_a_caller_that_does_not_wait_gets_a_202(http, worker):
    worker.open.clear()
    answer = await http.post(INFER, json=BODY, headers={"Prefer": "respond-async, wait=1"})
    assert answer.status_code == 202
    worker.open.set()
    assert (await ended(http, answer.json()["id"]))["status"] == "succeeded"


async def test_concurrent_submissions_are_separate_jobs(http, worker):
    bodies = [
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [n, n]}]} for n in range(300)
    ]
    answers = await asyncio.gather(*(http.post(INFER, json=body, headers=ASYNC) for body in bodies))
    assert {answer.status_code for answer in answers} == {202}
    ids = [answer.json()["id"] for answer in answers]
    assert len(set(ids)) == 300
    for n in (0, 150, 299):
        assert (await ended(http, ids[n]))["status"] == "succeeded"
        assert (await http.get(f"/v1/jobs/{ids[n]}/result")).json()["outputs"][0]["data"] == [n, n]


async def test_binary_tensors_in_request_and_result(http, worker):
    data = np.array([[3, 4]], np.float32).tobytes()
    head = {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": len(data)}}
        ],
        "parameters": {"binary_data_output": True},
    }
    raw = orjson.dumps(head)
    headers = ASYNC | {"Inference-Header-Content-Length": str(len(raw))}
    job = (await http.post(INFER, content=raw + data, headers=headers)).json()
    await ended(http, job["id"])
    binary = await http.get(job["urls"]["result"])
    length = int(binary.headers["inference-header-content-length"])
    assert binary.content[length:] == data
    as_json = await http.get(job["urls"]["result"], headers={"Accept": "application/json"})
    assert as_json.json()["outputs"][0]["data"] == [3, 4]


async def test_a_payload_too_large_for_a_message_goes_to_the_blob_store(gateway, http, worker):
    rows = 8
    values = [float(n % 97) for n in range(2 * rows)]
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2], "data": values}]}
    answer = await http.post("/v1/jobs", json=body | {"model": "digits"})
    assert answer.status_code == 202
    assert (await ended(http, answer.json()["id"]))["status"] == "succeeded"


async def test_the_payload_of_a_conflicting_key_is_deleted(gateway, http, worker):
    def kept():
        return sorted(path for path in (gateway.state / "data" / "blobs").rglob("*") if path.is_file())

    worker.open.clear()
    headers = ASYNC | {"Idempotency-Key": "large"}
    inputs = [{"name": "x", "datatype": "FP32", "shape": [8, 2], "data": [float(n) for n in range(16)]}]
    first = await http.post(INFER, json={"inputs": inputs}, headers=headers)
    assert first.status_code == 202
    before = kept()
    assert before
    again = await http.post(INFER, json={"inputs": inputs, "id": "other"}, headers=headers)
    assert again.status_code == 409
    assert kept() == before
    worker.open.set()
    await ended(http, first.json()["id"])


@pytest.mark.parametrize("path", ["/v1/jobs", INFER])
async def test_the_same_key_is_the_same_job(http, worker, path):
    body = BODY | ({"model": "digits"} if path == "/v1/jobs" else {})
    headers = ASYNC | {"Idempotency-Key": f"key{path}"}
    first = await http.post(path, json=body, headers=headers)
    second = await http.post(path, json=body, headers=headers)
    assert first.status_code == second.status_code == 202
    assert first.json()["id"] == second.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    other = await http.post(path, json=body | {"id": "other"}, headers=headers)
    assert other.status_code == 409
    assert other.json()["reason"] == "conflict"


async def test_an_idempotency_key_holds_in_other_gateway_processes(gateways, http, worker):
    other = gateways.start()
    headers = ASYNC | {"Idempotency-Key": "everywhere"}
    mine = await http.post(INFER, json=BODY, headers=headers)
    theirs = await http.post(f"{other.url}{INFER}", json=BODY, headers=headers)
    assert mine.json()["id"] == theirs.json()["id"]


async def test_many_calls_with_one_key_at_once_are_one_job(http, worker):
    headers = ASYNC | {"Idempotency-Key": "at once"}
    refused = await http.post(INFER, json=BODY, headers=headers)
    assert refused.status_code == 400
    headers = ASYNC | {"Idempotency-Key": "at-once"}
    answers = await asyncio.gather(*(http.post(INFER, json=BODY, headers=headers) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {202}
    (id_,) = {answer.json()["id"] for answer in answers}
    await ended(http, id_)
    assert worker.taken.count(read_id(id_)) == 1


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        ({"model": "nothing"}, 404, "not_found"),
        ({"model": "digits", "version": 9}, 404, "not_found"),
        ({}, 400, "bad_request"),
        ({"model": "digits", "inputs": []}, 400, "bad_request"),
        ({"model": "digits", "priority": "urgent"}, 400, "bad_request"),
        ({"model": "digits", "ttl_s": 0}, 400, "bad_request"),
        ({"model": "digits", "webhook": "ftp://example.org/"}, 400, "bad_request"),
        ({"model": "digits", "metadata": ["x"]}, 400, "bad_request"),
        ({"model": "digits", "metadata": {"x": "x" * 5000}}, 400, "bad_request"),
    ],
)
async def test_invalid_submissions_are_refused_at_once(http, given, status, reason):
    answer = await http.post("/v1/jobs", json=BODY | given)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)


async def test_a_call_without_preference_is_no_job(http, worker, store):
    before = (await store.counts()).ledger.get("accepted", 0)
    answer = await http.post(
        INFER, json=BODY, headers={"Prefer": "handling=strict", "X-Request-Timeout-Ms": "50"}
    )
    assert answer.status_code == 504
    assert (await store.counts()).ledger.get("accepted", 0) == before


async def test_the_job_of_a_caller_that_disconnects_is_accepted(http, worker, store, until):
    worker.open.clear()
    headers = {"Prefer": "wait=30", "Idempotency-Key": "leaves"}
    call = asyncio.create_task(http.post(INFER, json=BODY, headers=headers))
    await until(lambda: worker.frames)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    worker.open.set()
    again = await http.post(INFER, json=BODY, headers=headers)
    assert again.status_code == 200


async def test_an_unpublished_job_is_published_when_its_key_is_used_again(
    gateway, http, worker, store, until
):
    """A gateway may be killed after it wrote the record and before it published the message."""
    worker.open.clear()
    headers = ASYNC | {"Idempotency-Key": "killed"}
    id_ = (await http.post(INFER, json=BODY, headers=headers)).json()["id"]
    raw = read_id(id_)

    def sent():
        return sum(frame.id == raw for frame in worker.frames)

    await until(lambda: sent() == 1)
    await until(lambda: gateway.jobs.hget(b"tidegate:job:r:" + (raw or b""), "state") != b"accepting")
    gateway.jobs.hset(b"tidegate:job:r:" + (raw or b""), "state", "accepting")
    gateway.jobs.zrem("tidegate:job:state:queued", raw)
    gateway.jobs.zadd("tidegate:job:state:accepting", {raw: 0})
    again = await http.post(INFER, json=BODY, headers=headers)
    assert again.json()["id"] == id_
    worker.open.set()
    assert (await ended(http, id_))["status"] == "succeeded"
    await until(lambda: sent() == 2)
    assert worker.taken.count(raw) == 1


async def test_acknowledged_jobs_are_written_to_the_ledger(http, worker, store, until):
    before = sum((await store.counts()).acknowledged.values())
    for _ in range(3):
        await http.post(INFER, json=BODY, headers=ASYNC)

    async def told():
        return sum((await store.counts()).acknowledged.values()) >= before + 3

    await until(told)


async def test_frames_carry_what_the_worker_needs(http, worker):
    job = (await http.post(INFER, json=BODY, headers=ASYNC | {"X-Request-Id": "trace-me"})).json()
    await ended(http, job["id"])
    (frame,) = [frame for frame in worker.frames if frame.id.hex() == job["id"]]
    assert frame.flags & envelope.RETRY_SAFE
    assert frame.trace == b"trace-me"
