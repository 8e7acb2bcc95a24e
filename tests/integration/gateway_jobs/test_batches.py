"""Batches run each line once and in order, also after failures, cancellations and a killed gateway."""

from __future__ import annotations

import asyncio
import gzip

import httpx
import orjson
import pytest

from tests.conftest import PATIENCE_S

pytestmark = pytest.mark.integration


def line(n, **given):
    head = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [n, -n]}]}
    return head | {"id": f"line {n}"} | given


def file_of(lines):
    return b"\n".join(map(orjson.dumps, lines)) + b"\n"


async def create(http, content, status=202, **given):
    params = {"model": "digits"} | given.pop("params", {})
    answer = await http.post("/v1/batches", content=content, params=params, **given)
    assert answer.status_code == status, answer.text
    return answer.json()


async def over(http, batch, until, patience_s=5 * PATIENCE_S):
    async def done():
        found = (await http.get(batch["urls"]["status"])).json()
        return found if found["status"] not in {"running", "cancelling"} else None

    return await until(done, patience_s=patience_s)


async def rows_of(http, batch):
    answer = await http.get(batch["urls"]["results"])
    assert answer.status_code == 200
    return [orjson.loads(row) for row in answer.content.splitlines()]


async def test_every_line_has_its_result_in_order(http, worker, until):
    batch = await create(http, file_of(line(n) for n in range(2500)))
    assert (batch["status"], batch["lines"], batch["priority"]) == ("running", 2500, "low")
    done = await over(http, batch, until)
    assert (done["status"], done["done"]) == ("completed", 2500)
    assert done["counts"] == {"succeeded": 2500, "failed": 0, "cancelled": 0, "expired": 0}
    rows = await rows_of(http, batch)
    assert [row["line"] for row in rows] == list(range(2500))
    assert [row["id"] for row in rows] == [f"line {n}" for n in range(2500)]
    assert [row["response"]["outputs"][0]["data"] for row in rows] == [[n, -n] for n in range(2500)]
    job = (await http.get(f"/v1/jobs/{rows[7]['job']}")).json()
    assert (job["batch"], job["line"], job["priority"]) == (batch["id"], 7, "low")
    found = (await http.get(batch["urls"]["jobs"], params={"limit": 3})).json()
    assert {item["batch"] for item in found["items"]} == {batch["id"]}


async def test_errors_of_invalid_lines_are_in_order(http, worker, until):
    lines = [line(0), line(1, model="nothing"), line(2, inputs=[]), line(3, priority="urgent"), line(4)]
    content = file_of(lines) + b"no json\n\n" + orjson.dumps([1]) + b"\n" + orjson.dumps(line(7))
    batch = await create(http, content)
    done = await over(http, batch, until)
    assert done["counts"] == {"succeeded": 3, "failed": 5, "cancelled": 0, "expired": 0}
    rows = await rows_of(http, batch)
    told = [row.get("error", {}).get("reason") for row in rows]
    assert told == [None, "not_found", "bad_request", "bad_request", None, "bad_request", "bad_request", None]
    assert [row["id"] for row in rows][:3] == ["line 0", "line 1", "line 2"]
    assert rows[1]["job"] is None


async def test_a_line_that_the_model_refuses_fails_alone(http, worker, until):
    def answer(request):
        if bytes(request.data[0])[:4] == b"\0\0\0\0":
            raise ValueError("zero")
        return worker.echo(request)

    worker.answer = answer
    batch = await create(http, file_of(line(n) for n in range(5)))
    assert (await over(http, batch, until))["counts"]["failed"] == 1
    rows = await rows_of(http, batch)
    assert rows[0]["error"] == {"reason": "model_failed", "message": "zero"}
    assert [row["status"] for row in rows] == ["failed", *["succeeded"] * 4]


async def test_a_cancelled_batch_has_a_result_for_each_line(http, worker, until):
    worker.open.clear()
    batch = await create(http, file_of(line(n) for n in range(3000)))
    await until(lambda: worker.frames)
    answer = await http.delete(batch["urls"]["cancel"])
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelling")
    done = await over(http, batch, until)
    assert (done["status"], done["counts"]["cancelled"]) == ("cancelled", 3000)
    worker.open.set()
    rows = await rows_of(http, batch)
    assert [row["line"] for row in rows] == list(range(3000))
    assert {row["status"] for row in rows} == {"cancelled"}


async def test_results_before_the_end(http, worker, until):
    worker.open.clear()
    batch = await create(http, file_of([line(0)]))
    early = await http.get(batch["urls"]["results"])
    assert (early.status_code, early.json()["id"]) == (202, batch["id"])
    partly = await http.get(batch["urls"]["results"], params={"partial": True})
    assert (partly.status_code, partly.content) == (200, b"")
    worker.open.set()
    await over(http, batch, until)


async def test_a_compressed_file(http, worker, until):
    content = gzip.compress(file_of(line(n) for n in range(20)))
    batch = await create(http, content, headers={"Content-Encoding": "gzip"})
    assert batch["lines"] == 20
    assert (await over(http, batch, until))["counts"]["succeeded"] == 20
    await create(http, content[:50], 400, headers={"Content-Encoding": "gzip"})
    await create(http, b"x", 400, headers={"Content-Encoding": "br"})


@pytest.mark.parametrize(
    ("content", "params"),
    [
        (b"", {}),
        (b"\n \n", {}),
        (b"no json\n", {}),
        (b"[1]\n", {}),
        (b"{}\n", {"priority": "urgent"}),
        (b"{}\n", {"ttl_s": 0}),
    ],
)
async def test_invalid_batches_are_refused_at_once(http, content, params):
    told = await create(http, content, 400, params=params)
    assert told["reason"] == "bad_request"


async def test_a_caller_lists_only_its_own_batches(gateway, http, worker, until):
    first = await create(http, file_of([line(0)]))
    second = await create(http, file_of([line(1)]))
    page = (await http.get("/v1/batches", params={"limit": 1})).json()
    assert [item["id"] for item in page["items"]] == [second["id"]]
    following = (await http.get("/v1/batches", params={"limit": 1, "cursor": page["next"]})).json()
    assert [item["id"] for item in following["items"]] == [first["id"]]
    await over(http, second, until)
    gateway.jobs.hset(b"tidegate:batch:r:" + bytes.fromhex(second["id"]), "principal", "somebody")
    for method, path in (("GET", "status"), ("GET", "results"), ("DELETE", "cancel")):
        assert (await http.request(method, second["urls"][path])).status_code == 404


async def test_another_gateway_continues_the_batch_of_a_killed_one(gateways, worker, until):
    """Each line runs once: jobs in progress are found again, not submitted again."""
    doomed, heir = gateways.start(), None
    async with httpx.AsyncClient(base_url=doomed.url, timeout=120) as http:
        worker.open.clear()
        batch = await create(http, file_of(line(n) for n in range(3000)))
        await until(lambda: len(worker.frames) >= 200)
        # Started only now, so the batch belongs to the gateway that will be killed.
    doomed.process.kill()
    doomed.process.wait()
    worker.open.set()
    heir = gateways.start()
    async with httpx.AsyncClient(base_url=heir.url, timeout=120) as http:
        done = await over(http, batch, until)
        assert done["counts"]["succeeded"] == 3000
        rows = await rows_of(http, batch)
        assert [row["response"]["outputs"][0]["data"] for row in rows] == [[n, -n] for n in range(3000)]
        jobs = [row["job"] for row in rows]
        assert len(set(jobs)) == 3000
        assert sorted(id_.hex() for id_ in worker.taken if id_.hex() in set(jobs)) == sorted(jobs)


async def test_a_stopping_gateway_releases_its_batch_at_once(gateways, worker, until):
    leaving = gateways.start()
    async with httpx.AsyncClient(base_url=leaving.url, timeout=120) as http:
        worker.open.clear()
        batch = await create(http, file_of(line(n) for n in range(500)))
        await until(lambda: worker.frames)
    leaving.process.terminate()
    await asyncio.to_thread(leaving.process.wait, PATIENCE_S)
    worker.open.set()
    heir = gateways.start()
    async with httpx.AsyncClient(base_url=heir.url, timeout=120) as http:
        assert (await over(http, batch, until))["counts"]["succeeded"] == 500


async def test_a_file_without_a_newline_is_bounded_by_line_limit_and_budget(gateways, until):
    """Long lines are refused while they arrive, and held bytes count like bodies of requests."""
    mib, rest = 2**20, asyncio.Event()

    async def pieces(size, last=b""):
        for _ in range(size // 65536):
            yield b"x" * 65536
        if last:
            await rest.wait()
            yield last

    gateway = gateways.start(
        max_batch_line_bytes=str(2 * mib), max_inflight_bytes=str(6 * mib), max_batch_bytes=str(64 * mib)
    )
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, params={"model": "digits"}) as http:
        answer = await http.post("/v1/batches", content=pieces(4 * mib))
        assert (answer.status_code, answer.json()["reason"]) == (413, "payload_too_large")
        assert "line 1 is longer than 2097152 bytes" in answer.json()["error"]

        async def refused():
            """Start an upload that holds most of the memory. Return it, and the refusal of a second upload.

            Return None if no upload was refused.
            """
            rest.clear()
            held = asyncio.create_task(http.post("/v1/batches", content=pieces(2 * mib - 65536, b"\n")))
            for _ in range(20):
                answer = await http.post("/v1/batches", content=pieces(mib, b""))
                if answer.status_code == 503:
                    return held, answer
            rest.set()  # a small upload took the memory first, so the large one was refused
            await held
            return None

        held, answer = await until(refused)
        assert answer.json()["reason"] == "overloaded"
        rest.set()
        assert (await held).status_code == 400  # the line is not JSON
        await create(http, file_of([line(0)]))  # all memory was returned to the budget
