"""Short outages of broker and store: callers wait, and each gets one job."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.jobs import read_id
from tidegate.kernel.store import JobStore
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import jobs_running

pytestmark = pytest.mark.integration

BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
INFER = "/v2/models/digits/infer"
ASYNC = {"Prefer": "respond-async"}


async def test_the_broker_is_away_for_a_moment(gateways, worker, line, store):
    mine = await asyncio.to_thread(gateways.start, amqp_url=line.url)
    async with httpx.AsyncClient(base_url=mine.url, timeout=120) as http:
        assert (await http.post(INFER, json=BODY, headers=ASYNC)).status_code == 202
        before = (await store.counts()).ledger["accepted"]
        await line.down()
        calls = [asyncio.create_task(http.post(INFER, json=BODY, headers=ASYNC)) for _ in range(20)]
        await asyncio.sleep(0.3)
        assert not any(call.done() for call in calls)
        await line.up()
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {202}
        ids = {answer.json()["id"] for answer in answers}
        assert len(ids) == 20
        for id_ in ids:
            done = (await http.get(f"/v1/jobs/{id_}", headers={"Prefer": "wait=100"})).json()
            assert done["status"] == "succeeded"
            assert worker.taken.count(read_id(id_)) == 1
        assert (await store.counts()).ledger["accepted"] == before + 20


async def test_the_broker_is_lost_while_it_confirms(gateways, worker, line):
    """An unconfirmed message is published again, and the worker takes the job once."""
    mine = await asyncio.to_thread(gateways.start, amqp_url=line.url)
    async with httpx.AsyncClient(base_url=mine.url, timeout=120) as http:
        calls = []
        for n in range(200):
            calls.append(asyncio.create_task(http.post(INFER, json=BODY, headers=ASYNC)))
            if n % 50 == 25:
                await asyncio.sleep(0.02)
                line.cut()
        answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {202}
        for answer in answers:
            done = (await http.get(answer.headers["location"], headers={"Prefer": "wait=100"})).json()
            assert (done["status"], done["attempts"]) == ("succeeded", 1)
            assert worker.taken.count(read_id(done["id"])) == 1


async def test_the_store_is_away_for_a_moment(gateways):
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        with jobs_running(Path(folder), port=port) as url:
            mine = await asyncio.to_thread(gateways.start, jobs_url=url)
            async with httpx.AsyncClient(base_url=mine.url, timeout=120) as http:
                first = await http.post(INFER, json=BODY, headers=ASYNC)
                assert first.status_code == 202
        async with httpx.AsyncClient(base_url=mine.url, timeout=120) as http:
            calls = [asyncio.create_task(http.post(INFER, json=BODY, headers=ASYNC)) for _ in range(20)]
            await asyncio.sleep(0.3)
            interactive = {"Prefer": "handling=strict", "X-Request-Timeout-Ms": "50"}
            # Interactive requests do not need the store: this one times out because no worker answers.
            assert (await http.post(INFER, json=BODY, headers=interactive)).status_code == 504
            with jobs_running(Path(folder), port=port) as url:
                answers = await asyncio.gather(*calls)
                assert {answer.status_code for answer in answers} == {202}
                store = JobStore.connect(url)
                assert (await store.counts()).ledger["accepted"] == 21
                shown = await http.get(first.headers["location"])
                assert shown.json()["id"] == first.json()["id"]
                await store.close()
                mine.process.terminate()
                await asyncio.to_thread(mine.process.wait, PATIENCE_S)


async def test_a_waiting_caller_gets_a_202_if_the_store_goes_away(gateways):
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        async with httpx.AsyncClient(timeout=120) as http:
            with jobs_running(Path(folder), port=port) as url:
                mine = await asyncio.to_thread(gateways.start, jobs_url=url)
                call = asyncio.create_task(
                    http.post(mine.url + INFER, json=BODY, headers={"Prefer": "wait=9"})
                )
                store = JobStore.connect(url)
                while not (await store.counts()).states.get("queued"):
                    await asyncio.sleep(0.01)
                await store.close()
            answer = await call
        assert answer.status_code == 202
        assert answer.json()["urls"]["status"] == answer.headers["location"]
        mine.process.terminate()
        await asyncio.to_thread(mine.process.wait, PATIENCE_S)


async def test_too_many_queued_jobs(gateways, worker):
    mine = await asyncio.to_thread(gateways.start, max_waiting_jobs="3")
    worker.open.clear()
    async with httpx.AsyncClient(base_url=mine.url, timeout=120) as http:
        answers = [await http.post(INFER, json=BODY, headers=ASYNC) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {202}
        while (
            answers[-1].status_code == 202 and len(answers) < 30
        ):  # the estimate may lack a job for a moment
            answers.append(await http.post(INFER, json=BODY, headers=ASYNC))
        assert answers[-1].status_code == 503
        assert answers[-1].json()["reason"] == "overloaded"
        assert answers[-1].headers["retry-after"] == "10"
    worker.open.set()
