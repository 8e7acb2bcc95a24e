"""Jobs of a language model at a worker: one answer each, in slots that streams leave free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import orjson
import pytest

from services.worker.adapters.model_call import ModelAnswer
from services.worker.domain import llm_answers
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.split import Output
from tests.integration.gated_model import GatedModel
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Request, Tensor
from tidegate.kernel.protocol.llm import LlmRequest
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

pytestmark = pytest.mark.integration

KEY = envelope.call_key((Tensor("request", DATATYPES["BYTES"], (1,)),), (), {})


class Talker(GatedModel):
    """A decoupled model that answers each request with one event. ``refusals`` are its next refusals."""

    decoupled = True

    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[dict[str, Any]] = []
        self.running = self.most = 0

    async def stream(self, request: Request) -> AsyncGenerator[ModelAnswer]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate([request], 1.0)
            wanted = LlmRequest.from_bytes(unpack_strings(request.data[0])[0])
            if self.refusals:
                yield answer({"error": {"message": "not now", "code": "no"}}, self.refusals.pop(0))
            else:
                yield answer({"path": wanted.path, "text": wanted.body["prompt"]}, {"usage": [3, 5, 1]})
        finally:
            self.running -= 1


def answer(event: dict[str, Any], meta: dict[str, Any]) -> ModelAnswer:
    raws = (("events", orjson.dumps(event)), ("meta", orjson.dumps(meta)))
    return ModelAnswer([Output(name, "BYTES", (1,), pack_strings([raw])) for name, raw in raws], {})


def ask(prompt: str) -> dict[str, Any]:
    """Return the parts of a job's frame that hold a request to the model."""
    return {"data": [pack_strings([LlmRequest("/v1/completions", {"prompt": prompt}).to_bytes()])]}


def read(raw: bytes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the event, the facts and the parameters of a result."""
    reply = envelope.read_reply(raw)
    _, parameters = envelope.read_result_key(reply.key)
    event, meta = (orjson.loads(unpack_strings(each)[0]) for each in reply.data)
    return event, meta, parameters


@pytest.fixture
def submit(gateway):
    """Return ``await submit(prompt, ...)``, which submits a job for the model and returns its id."""

    async def submitted(prompt: str, **given: Any) -> bytes:
        new = gateway.new(**given)
        frame = envelope.request_frame(
            new.id, new.expires_ms, 0, KEY, ask(prompt)["data"], flags=envelope.RETRY_SAFE
        )
        new = type(new)(**{name: getattr(new, name) for name in new.__slots__} | {"frame": frame})
        await gateway.store.accept(new)
        await gateway.publish(new)
        await gateway.store.queued([new.id])
        return new.id

    return submitted


async def test_a_job_gets_the_one_answer(start, gateway, submit, until, nothing_is_left):
    worker = await start(max_rows=0, streams=4, model=Talker())
    ids = [await submit(f"prompt {n}") for n in range(12)]
    await until(lambda: gateway.is_in("succeeded", *ids))
    for n, id_ in enumerate(ids):
        event, meta, parameters = read(await gateway.store.result(id_))
        assert event == {"path": "/v1/completions", "text": f"prompt {n}"}
        assert meta == {"usage": [3, 5, 1]}
        assert parameters == {"prompt_tokens": 3, "completion_tokens": 5}
    assert worker.model.most <= 3, "one slot is kept for requests"
    assert sorted(id_ for call in worker.model.calls for id_ in call) == sorted(ids), "each ran once"
    await nothing_is_left(worker)


async def test_a_refused_job_fails_and_keeps_the_engines_answer(
    start, gateway, submit, until, nothing_is_left
):
    worker = await start(max_rows=0, streams=4, model=Talker())
    worker.model.refusals = [{"status": 400}]
    id_ = await submit("a prompt")
    await until(lambda: gateway.is_in("failed", id_))
    assert (await gateway.job(id_)).error == {"reason": "bad_request", "message": "not now"}
    event, meta, _ = read(await gateway.store.result(id_))
    assert (event["error"]["code"], meta["status"]) == ("no", 400)
    await nothing_is_left(worker)


async def test_a_job_waits_for_a_busy_engine(
    start, gateway, submit, until, nothing_is_left, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llm_answers, "PAUSES_S", (0.01, 0.02))
    worker = await start(max_rows=0, streams=4, model=Talker())
    worker.model.refusals = [{"status": 429, "retry_after_s": 0.01}, {"status": 503}, {"status": 429}]
    id_ = await submit("a prompt")
    await until(lambda: gateway.is_in("succeeded", id_))
    assert (await gateway.job(id_)).attempt == 1, "it was one attempt"
    assert worker.model.calls == [[id_]] * 4
    await nothing_is_left(worker)


async def test_jobs_leave_the_slots_that_streams_need(start, gateway, submit, until):
    """Streams take free slots first, and with the jobs they never have more than all slots."""
    worker = await start(max_rows=0, streams=3, model=Talker())
    model = worker.model
    model.open.clear()
    ids = [await submit(f"job {n}") for n in range(6)]
    await until(lambda: model.running == 2)
    for n in range(4):
        raw = envelope.request_frame(
            bytes([n] * 16), int(time.time() * 1e3) + 600_000, 0, KEY, ask(f"stream {n}")["data"],
            flags=envelope.STREAM,
        )  # fmt: skip
        delivery = UnackedDelivery(None, 1, "replies.v1.nobody", 1)
        worker.scheduler.add(QueuedRequest(envelope.read_request(raw), delivery, time.monotonic()))
    await until(lambda: worker.scheduler.streams.running == 1)
    await asyncio.sleep(0.2)
    assert (model.running, worker.scheduler.streams.in_hand, worker.jobs.open_calls) == (3, 4, 2)
    model.open.set()
    await until(lambda: gateway.is_in("succeeded", *ids))
    assert model.most == 3
    first_jobs = {call[0] for call in model.calls[:2]}
    streams_at = [at for at, call in enumerate(model.calls) if call[0] not in ids]
    later_jobs = [at for at, call in enumerate(model.calls) if call[0] in set(ids) - first_jobs]
    assert max(streams_at[:3]) < min(later_jobs), "streams that waited went before the next jobs"


async def test_a_cancelled_job_ends_its_request(start, gateway, submit, until, nothing_is_left):
    worker = await start(max_rows=0, streams=4, model=Talker())
    worker.model.open.clear()
    id_ = await submit("a prompt")
    await until(lambda: worker.model.running == 1)
    assert (await gateway.store.cancel(id_)).state == "cancelled"
    await gateway.cancel(id_)
    await until(lambda: worker.model.running == 0)
    assert worker.model.cancelled == 1
    await nothing_is_left(worker)


async def test_a_job_that_does_not_end_in_time_expires(start, gateway, submit, until, nothing_is_left):
    worker = await start(max_rows=0, streams=4, model=Talker())
    worker.model.open.clear()
    id_ = await submit("a prompt", ttl_s=1.0)
    await until(lambda: gateway.is_in("expired", id_))
    await until(lambda: worker.model.running == 0)
    worker.model.open.set()
    await nothing_is_left(worker)


async def test_a_job_of_a_lost_worker_runs_on_the_next(start, gateway, submit, until, nothing_is_left):
    first = await start(max_rows=0, streams=4, model=Talker())
    first.model.open.clear()
    ids = [await submit(f"prompt {n}") for n in range(5)]
    await until(lambda: first.model.running == 3)
    await first.die()
    second = await start(max_rows=0, streams=4, model=Talker())
    await until(lambda: gateway.is_in("succeeded", *ids))
    attempts = sorted([(await gateway.job(id_)).attempt for id_ in ids])
    assert attempts == [1, 1, 2, 2, 2]
    await nothing_is_left(second)
