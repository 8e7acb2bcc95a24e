"""Streams at the worker: each answer leaves at once and in order, and every delivery is settled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from services.worker.adapters.model_call import ModelAnswer
from services.worker.domain.split import Output
from tests.conftest import PATIENCE_S
from tests.integration.worker_amqp.conftest import Caller, brief
from tidegate.kernel.broker.topology import replies_queue
from tidegate.kernel.errors import BadRequest, ModelFailed, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import CHUNK, END, FAILED, RETRY_SAFE, STREAM, Reply, Request
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = pytest.mark.integration

SAFE = RETRY_SAFE | STREAM


class Speaker:
    """A decoupled model that says the words of its plan, one for each permit; ``fail`` raises once."""

    def __init__(self) -> None:
        self.plan = ["one", "two", "three"]
        self.go = asyncio.Semaphore(0)
        self.free = False
        self.begun: list[bytes] = []
        self.attempts: list[int] = []
        self.cancelled = 0
        self.fail: dict[int, Exception] = {}
        self.parameters: dict[str, str] = {}

    async def call(self, requests: list[Request], timeout_s: float) -> ModelAnswer:
        raise BadRequest("the model gives any number of answers")

    async def stream(self, request: Request) -> AsyncGenerator[ModelAnswer]:
        self.begun.append(request.id)
        self.attempts.append(request.attempt)
        try:
            for at, word in enumerate(self.plan):
                if not self.free:
                    await self.go.acquire()
                if at in self.fail:
                    raise self.fail.pop(at)
                more = {"at": at, **self.parameters}
                yield ModelAnswer([Output("said", "BYTES", (1,), pack_strings([word]))], more)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


@pytest.fixture
def model() -> Speaker:
    return Speaker()


@pytest.fixture
async def worker(start, model):
    return await start(streams=4, model=model)


def said(replies: list[Reply]) -> list[str]:
    return [unpack_strings(r.data[0])[0].decode() for r in replies if r.status == CHUNK]


def forms(replies: list[Reply]) -> list[tuple[int, int]]:
    return [(reply.status, reply.seq) for reply in replies]


async def test_each_answer_is_a_chunk(worker, model, caller, make, until, nothing_is_left):
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: model.begun == [id_])
    assert id_ not in caller.replies
    for count in (1, 2, 3):
        model.go.release()
        await until(lambda count=count: len(caller.replies.get(id_, [])) >= count)
        assert worker.requests.unsettled == 1 or count == 3
    await until(lambda: len(caller.replies[id_]) == 4)
    found = caller.replies[id_]
    assert forms(found) == [(CHUNK, 0), (CHUNK, 1), (CHUNK, 2), (END, 3)]
    assert said(found) == ["one", "two", "three"]
    assert [envelope.read_result_key(r.key)[1] for r in found[:3]] == [{"at": 0}, {"at": 1}, {"at": 2}]
    assert (worker.scheduler.stats.completed, worker.scheduler.stats.call_ms.value) == (1, None)
    await nothing_is_left(worker)


async def test_an_answer_with_more_parameters_than_a_message_holds(
    worker, model, caller, make, failure, until, nothing_is_left
):
    model.free, model.parameters = True, {"why": "x" * envelope.MAX_KEY}
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_))
    reason, message = failure(caller.reply(id_))
    assert (reason, "65536" in message) == ("model_failed", True)
    await nothing_is_left(worker)


async def test_a_thousand_answers_in_order(worker, model, caller, make, until):
    model.free, model.plan = True, [str(n) for n in range(1000)]
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_, [None])[-1] and caller.replies[id_][-1].status == END)
    assert said(caller.replies[id_]) == model.plan
    assert [seq for _, seq in forms(caller.replies[id_])] == list(range(1001))


async def test_the_limit_bounds_running_streams(worker, model, caller, make, until, nothing_is_left):
    ids = []
    for _ in range(6):
        ids += await caller.send(make([1, 2], flags=SAFE))
    # Four run. One more is held: of the sixth the worker knows nothing, another replica may have it.
    await until(lambda: len(model.begun) == 4 and worker.scheduler.in_hand == 5)
    model.free = True
    for _ in range(12):
        model.go.release()
    await until(lambda: sum(r[-1].status == END for r in caller.replies.values()) == 6)
    assert all(said(caller.replies[id_]) == model.plan for id_ in ids)
    await nothing_is_left(worker)


async def test_large_answers_stay_in_order(worker, model, caller, make, until, claims):
    model.free, model.plan = True, ["a" * 300_000, "b", "c" * 300_000]
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_, [None])[-1] and caller.replies[id_][-1].status == END)
    assert [(r.status, r.seq) for r in caller.replies[id_]] == [(CHUNK, 0), (CHUNK, 1), (CHUNK, 2), (END, 3)]
    for reply, word in zip(caller.replies[id_], model.plan, strict=False):
        data = await claims.redeem(reply.data) if reply.claimed else reply.data
        assert unpack_strings(data[0]) == [word.encode()]


async def test_a_cancelled_stream_ends(worker, model, caller, make, until, nothing_is_left):
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: model.begun == [id_])
    model.go.release()
    await until(lambda: id_ in caller.replies)
    await caller.cancel(id_)
    await until(lambda: model.cancelled == 1)
    await nothing_is_left(worker)
    assert forms(caller.replies[id_]) == [(CHUNK, 0)], "no more is said"


async def test_cancelled_while_it_waits(worker, model, caller, make, until, nothing_is_left):
    for _ in range(4):
        await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: len(model.begun) == 4)
    (late,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: worker.scheduler.in_hand == 5)
    await caller.cancel(late)
    await until(lambda: late in worker.scheduler._cancelled)
    model.free = True
    for _ in range(12):
        model.go.release()
    await until(lambda: worker.scheduler.in_hand == 0)
    assert late not in model.begun
    await nothing_is_left(worker)


async def test_the_deadline_applies_to_the_first_answer(worker, model, caller, make, until, nothing_is_left):
    (id_,) = await caller.send(make([1, 2], flags=SAFE, timeout_s=2.0))
    await until(lambda: model.cancelled == 1)
    await nothing_is_left(worker)
    assert id_ not in caller.replies, "the gateway has told its caller"


async def test_the_deadline_does_not_apply_to_later_answers(worker, model, caller, make, until):
    (id_,) = await caller.send(make([1, 2], flags=SAFE, timeout_s=3.0))
    await until(lambda: model.begun == [id_])
    model.go.release()
    await until(lambda: id_ in caller.replies)
    await asyncio.sleep(3.1)
    model.go.release()
    model.go.release()
    await until(lambda: forms(caller.replies[id_])[-1] == (END, 3))


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("error", "reason"), [(ModelFailed("out of tea"), "model_failed"), (KeyError("FP8"), "model_failed")]
)
async def test_a_caller_gets_the_failure(
    worker, model, caller, make, failure, until, nothing_is_left, at, error, reason
):
    model.free, model.fail = True, {at: error}
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_) and caller.replies[id_][-1].status == FAILED)
    assert said(caller.replies[id_]) == model.plan[:at]
    assert failure(caller.replies[id_][-1])[0] == reason
    assert worker.scheduler.stats.failed == 1
    await nothing_is_left(worker)


async def test_triton_lost_before_the_first_answer(worker, model, caller, make, until, nothing_is_left):
    """The stream runs again as another attempt, here on the same worker."""
    model.free, model.fail = True, {0: Unavailable("gone")}
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_) and caller.replies[id_][-1].status == END)
    assert said(caller.replies[id_]) == model.plan
    assert {reply.attempt for reply in caller.replies[id_]} == {2}, "it was alone"
    assert model.attempts == [0, 2]
    await nothing_is_left(worker)


async def test_triton_lost_in_the_middle(worker, model, caller, make, failure, until, nothing_is_left):
    model.free, model.fail = True, {1: Unavailable("gone")}
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: caller.replies.get(id_) and caller.replies[id_][-1].status == FAILED)
    assert failure(caller.replies[id_][-1]) == (
        "unavailable",
        "the model server was lost in the middle of the stream",
    )
    await nothing_is_left(worker)
    assert model.begun == [id_], "not begun again"


async def test_a_worker_that_dies(start, worker, model, caller, make, until, nothing_is_left):
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: model.begun == [id_])
    model.go.release()
    await until(lambda: id_ in caller.replies)
    await worker.die()
    after = Speaker()
    after.free = True
    heir = await start(streams=4, model=after)
    await until(lambda: caller.replies[id_][-1].status == END)
    assert [(r.attempt, r.seq) for r in caller.replies[id_]] == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    await nothing_is_left(heir)


async def test_a_worker_that_dies_long_after_the_deadline(start, worker, model, caller, make, failure, until):
    """The broker would drop the message, so the caller, which has a part, gets an error at once."""
    frame = make([1, 2], flags=SAFE, deadline_ms=int(time.time() * 1e3) + 4000)
    (id_,) = await caller.send(frame)
    await until(lambda: model.begun == [id_])
    model.go.release()
    await until(lambda: id_ in caller.replies)
    await asyncio.sleep(4.1)
    await worker.die()
    await start(streams=4, model=Speaker())
    await until(lambda: caller.replies[id_][-1].status == FAILED)
    assert failure(caller.replies[id_][-1])[0] == "unavailable"


async def test_a_plain_request_is_rejected(worker, caller, make, failure, until, nothing_is_left):
    (id_,) = await caller.send(make([1, 2]))
    assert failure(await until(lambda: caller.reply(id_)))[0] == "bad_request"
    await nothing_is_left(worker)


async def test_a_stream_of_a_model_with_one_answer(
    start, caller, make, shown, failure, until, nothing_is_left
):
    """It shares its call with plain requests, and gets one chunk and the END."""
    worker = await start(serving=False)
    ids = await caller.send(make([1, 1], flags=SAFE), make([2, 2]), make([3, 3], flags=SAFE))
    (bad,) = await caller.send(make([-1, 1], flags=SAFE, key="other"))
    await until(lambda: worker.scheduler.in_hand == 4)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 4 and len(caller.replies[ids[2]]) == 2)
    assert worker.model.calls[0] == ids
    assert forms(caller.replies[ids[0]]) == forms(caller.replies[ids[2]]) == [(CHUNK, 0), (END, 1)]
    assert shown(caller.replies[ids[2]][0]) == [[6, 6]]
    assert shown(caller.reply(ids[1])) == [[4, 4]]
    assert failure(caller.reply(bad)) == ("bad_request", "a negative number")
    await nothing_is_left(worker)


async def test_a_stop_returns_streams_to_the_queue(worker, model, caller, make, until, left):
    (id_,) = await caller.send(make([1, 2], flags=SAFE))
    await until(lambda: model.begun == [id_])
    await worker.stop()
    await until(lambda: left(), "it is back in the queue")


async def test_the_stream_of_a_gateway_that_was_killed_ends(
    worker, model, rabbitmq_url, queue, make, until, nothing_is_left
):
    worker.publisher.gone_s = 0.5
    model.free, model.plan = True, ["word"] * 1_000_000
    killed = Caller(rabbitmq_url, queue)
    killed.reply_to = brief(killed.reply_to)
    async with killed.connection:
        await killed.connection.wait_up(PATIENCE_S)
        (id_,) = await killed.send(make([1, 2], flags=SAFE))
        await until(lambda: killed.replies.get(id_))
    await until(lambda: model.cancelled == 1)
    await nothing_is_left(worker)


async def test_a_chunk_waits_for_the_queue_of_a_gateway_that_reconnects(worker, caller):
    queue = replies_queue("late")
    sending = asyncio.create_task(
        worker.publisher.send_chunks(queue.name, [envelope.end_frame(b"i" * 16, 0, 0)])
    )
    await asyncio.sleep(0.3)
    await caller.channel.declare(queue)
    await sending
    assert await caller.channel.depth(queue) == 1
