"""Requests to language models with ``Prefer``: they become jobs, with the model's own answers as results."""

from __future__ import annotations

import orjson
import pytest

pytestmark = pytest.mark.integration

URL = "/v1/completions"
BODY = {"model": "chat", "prompt": "hello"}


async def ask(http, body, prefer, status, path=URL, **headers):
    answer = await http.post(path, json=body, headers={"prefer": prefer} | headers)
    assert answer.status_code == status, answer.text
    return answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", URL, "/v1/embeddings", "/v1/responses"])
async def test_a_request_becomes_a_job(http, talker, until, path):
    answer = await ask(http, BODY, "respond-async", 202, path)
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert answer.headers["preference-applied"] == "respond-async"
    assert (job["status"], job["endpoint"], job["priority"]) == ("queued", "chat", "normal")

    async def done():
        found = (await http.get(answer.headers["location"])).json()
        return found["status"] == "succeeded"

    await until(done)
    result = await http.get(job["urls"]["result"])
    assert (result.status_code, result.headers["content-type"]) == (200, "application/json")
    assert result.json() == {"object": path, "model": "chat", "text": "hello"}


async def test_waiting_for_the_answer(http, talker):
    answer = await ask(http, BODY, "respond-async, wait=60", 200)
    assert answer.json()["text"] == "hello"
    assert answer.headers["preference-applied"] == "wait=60"
    assert (await http.get(answer.headers["content-location"])).content == answer.content


async def test_options_of_a_job(http, talker):
    talker.open.clear()
    job = (await ask(http, BODY | {"service_tier": "flex"}, "respond-async", 202)).json()
    assert job["priority"] == "low"
    job = (await ask(http, BODY, "wait=1", 202, **{"X-Job-Priority": "high", "X-Job-TTL": "90"})).json()
    assert job["priority"] == "high"
    assert (await http.delete(job["urls"]["cancel"])).json()["status"] == "cancelled"
    gone = await http.get(job["urls"]["result"])
    assert (gone.status_code, gone.json()["reason"]) == (409, "cancelled")
    talker.open.set()


async def test_a_key_makes_one_job(http, talker):
    first = await ask(http, BODY, "respond-async", 202, **{"Idempotency-Key": "one"})
    turned = dict(reversed(BODY.items()))
    again = await ask(http, turned, "respond-async", 202, **{"Idempotency-Key": "one"})
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    other = await ask(http, BODY | {"prompt": "x"}, "wait=5", 409, **{"Idempotency-Key": "one"})
    assert other.json()["error"]["type"] == "invalid_request_error"
    elsewhere = await ask(http, BODY, "wait=5", 409, "/v1/embeddings", **{"Idempotency-Key": "one"})
    assert elsewhere.status_code == 409


async def test_the_engines_refusal_is_the_result(http, talker):
    answer = await ask(http, BODY | {"prompt": "refuse"}, "wait=60", 400)
    error = answer.json()["error"]
    assert (error["message"], error["code"], error["param"]) == ("no such thing", "no", "prompt")
    again = await http.get(answer.headers["content-location"])
    assert (again.status_code, again.json()) == (400, answer.json())
    (job, *_) = (await http.get("/v1/jobs", params={"status": "failed", "endpoint": "chat"})).json()["items"]
    assert job["error"] == {"reason": "bad_request", "message": "no such thing"}


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (BODY | {"stream": True}, 400, "cannot stream"),
        ({"prompt": "x"}, 400, "'model'"),
        (BODY | {"model": "nothing"}, 404, "nothing"),
        (BODY | {"model": "digits"}, 400, "not a language model"),
        (BODY | {"model": "chat:adapter"}, 404, "adapter"),
    ],
)
async def test_requests_that_cannot_be_jobs(http, body, status, word):
    error = (await ask(http, body, "respond-async", status)).json()["error"]
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_a_failed_job_runs_again_on_request(http, talker):
    answer = await ask(http, BODY | {"prompt": "refuse"}, "wait=60", 400)
    job = answer.headers["content-location"].removesuffix("/result")
    again = await http.post(f"{job}/retry")
    assert again.status_code == 202, again.text
    found = await http.get(again.json()["urls"]["result"], headers={"prefer": "wait=60"})
    assert found.json()["error"]["code"] == "no"


async def test_a_long_answer(http, talker):
    """It is above the inline size, so the blob store has it."""
    long = "x" * 200_000
    answer = await ask(http, BODY | {"prompt": long}, "wait=60", 200)
    assert orjson.loads(answer.content)["text"] == long
