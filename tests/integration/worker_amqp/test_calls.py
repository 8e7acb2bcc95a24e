"""Which requests share a model call, and that each caller gets exactly its own answer."""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.topology import replies_queue
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.tensors import unpack_strings

pytestmark = pytest.mark.integration


async def test_a_request_is_answered(start, caller, make, shown, until, nothing_is_left):
    worker = await start()
    (id_,) = await caller.send(make([1, 2], [3, 4]))
    reply = await until(lambda: caller.reply(id_))
    assert shown(reply) == [[2, 4], [6, 8]]
    assert (reply.status, reply.rows, reply.attempt, reply.shared) == (envelope.OK, 2, 0, 1)
    outputs, _ = envelope.read_result_key(reply.key)
    assert [(t.name, t.dims) for t in outputs] == [("y", (2,))]
    assert worker.scheduler.stats.completed == 1
    await nothing_is_left(worker)


async def test_64_callers_of_mixed_size(start, caller, make, shown, until, nothing_is_left):
    """Requests come in envelopes of several, wait together and share calls; each answer is checked."""
    worker = await start(serving=False)
    draw = random.Random(7)
    asked: dict[bytes, tuple[list[list[float]], list[str]]] = {}
    frames = []
    for number in range(64):
        rows = [[float(number), float(at)] for at in range(draw.randint(1, 5))]
        words = [f"{number}/{at}" + "ü" * draw.randint(0, 9) for at in range(len(rows))] if number % 3 else []
        frame = make(*rows, words=words, key="x" if number % 2 else "other")
        asked[frame[:16]] = (rows, words)
        frames.append(frame)
    worker.scheduler.stats.call_ms.add(0.1)  # as after a while of light calls: hold many
    await worker.requests.close()
    await worker.requests.open()
    while frames:
        size = draw.randint(1, 7)
        await caller.send(*frames[:size])
        frames = frames[size:]
    await until(lambda: worker.scheduler.in_hand == 64)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 64)
    for id_, (rows, words) in asked.items():
        reply = caller.reply(id_)
        assert shown(reply) == [[2 * a, 2 * b] for a, b in rows]
        assert reply.rows == len(rows)
        if words:
            assert [word.decode(errors="replace") for word in unpack_strings(reply.data[1])] == [
                word.encode()[::-1].decode(errors="replace") for word in words
            ]
    calls = worker.model.calls
    assert sum(map(len, calls)) == 64
    assert len(calls) < 40
    sizes = {id_: len(rows) for id_, (rows, _) in asked.items()}
    assert all(len(call) == 1 or sum(sizes[id_] for id_ in call) <= 8 for call in calls)
    assert {caller.reply(id_).shared for call in calls for id_ in call} == {len(call) for call in calls}
    await nothing_is_left(worker)


async def test_callers_of_two_gateways_share_a_call(start, caller, rabbitmq_url, queue, make, shown, until):
    worker = await start(serving=False)
    other = type(caller)(rabbitmq_url, queue)
    async with other.connection:
        await other.connection.wait_up(PATIENCE_S)
        (mine,) = await caller.send(make([1, 1]))
        (theirs,) = await other.send(make([2, 2]))
        await until(lambda: worker.scheduler.in_hand == 2)
        worker.scheduler.use(worker.model)
        assert shown(await until(lambda: caller.reply(mine))) == [[2, 2]]
        assert shown(await until(lambda: other.reply(theirs))) == [[4, 4]]
    assert worker.model.calls == [[mine, theirs]]
    assert (list(caller.replies), list(other.replies)) == ([mine], [theirs])


async def test_a_bad_request_does_not_fail_its_neighbours(
    start, caller, make, shown, failure, until, nothing_is_left
):
    worker = await start(serving=False)
    ids = await caller.send(make([1, 1]), make([2, 2]), make([-3, 3]), make([4, 4]))
    await until(lambda: worker.scheduler.in_hand == 4)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 4)
    assert failure(caller.reply(ids[2])) == ("bad_request", "a negative number")
    for id_, number in zip(ids, (1, 2, None, 4), strict=True):
        if number is not None:
            assert shown(caller.reply(id_)) == [[2 * number, 2 * number]]
    assert worker.model.calls == [ids, *([id_] for id_ in ids)]
    assert worker.scheduler.stats.failed == 1
    await nothing_is_left(worker)


@pytest.mark.parametrize("error", [ModelFailed, BadRequest])
async def test_only_requests_that_may_run_twice_are_retried_after_a_shared_failure(
    start, caller, make, shown, failure, until, nothing_is_left, error
):
    """A model may also reject a request after it has worked."""
    worker = await start(serving=False)
    never = make([2, 2], flags=0)
    ids = await caller.send(make([1, 1]), never, make([3, 3]))
    await until(lambda: worker.scheduler.in_hand == 3)

    def fail(requests) -> None:
        if len(requests) > 1:
            raise error("out of tea")

    worker.model.fail = fail
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 3)
    shared = "a model call with several requests failed, and this request may not run twice: out of tea"
    assert failure(caller.reply(ids[1])) == ("model_failed", shared)
    assert shown(caller.reply(ids[0])) == [[2, 2]]
    assert shown(caller.reply(ids[2])) == [[6, 6]]
    assert worker.model.calls == [ids, [ids[0]], [ids[2]]], "it ran once"
    await nothing_is_left(worker)


async def test_a_cancelled_request_is_not_retried_alone(start, caller, make, until, nothing_is_left):
    worker = await start(serving=False)
    gone, wanted = await caller.send(make([1, 1]), make([2, 2]))
    await until(lambda: worker.scheduler.in_hand == 2)

    def fail(requests) -> None:
        if len(requests) > 1:
            worker.scheduler.cancel([gone])
            raise BadRequest("one of them is wrong")

    worker.model.fail = fail
    worker.scheduler.use(worker.model)
    await until(lambda: caller.reply(wanted))
    assert worker.model.calls == [[gone, wanted], [wanted]]
    assert list(caller.replies) == [wanted]
    await nothing_is_left(worker)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BadRequest("not like this"), ("bad_request", "not like this")),
        (ModelFailed("out of tea"), ("model_failed", "out of tea")),
        (ValueError("a value that no message can carry"), None),
        (KeyError("FP8"), None),
    ],
    ids=repr,
)
async def test_a_caller_gets_the_failure(
    start, caller, make, shown, failure, until, error, expected, nothing_is_left
):
    """Also of an unexpected exception; the worker goes on with all its calls."""
    worker = await start()

    def fail(requests) -> None:
        if bytes(requests[0].data[0]) == bytes(8):
            raise error

    worker.model.fail = fail
    for _ in range(4):  # more than it may hold unsettled
        (id_,) = await caller.send(make([0, 0]))
        reply = await until(lambda id_=id_: caller.reply(id_), patience_s=5)
        if expected is None:
            assert reply.status == envelope.FAILED
        else:
            assert failure(reply) == expected
    (id_,) = await caller.send(make([1, 1]))
    assert shown(await until(lambda: caller.reply(id_))) == [[2, 2]]
    await nothing_is_left(worker)


async def test_a_caller_gets_an_error_for_an_unreadable_key(start, caller, until, nothing_is_left):
    worker = await start()

    def fail(requests) -> None:
        for request in requests:
            envelope.read_call_key(request.key)

    worker.model.fail = fail
    deadline = int((time.time() + 20) * 1e3)
    (id_,) = await caller.send(envelope.request_frame(os.urandom(16), deadline, 1, b"garbage", [bytes(8)]))
    assert (await until(lambda: caller.reply(id_))).status == envelope.FAILED
    await nothing_is_left(worker)


async def test_an_answer_with_too_few_rows_is_an_error(start, caller, make, failure, until, nothing_is_left):
    """The model returns one row for two requests: neither may get the row of the other."""
    worker = await start(serving=False)
    original = worker.model.call

    async def short(requests, timeout_s):
        answer = await original(requests, timeout_s)
        (output,) = answer.outputs
        return answer._replace(outputs=[output._replace(shape=(1, 2), raw=output.raw[:8])])

    worker.model.call = short
    ids = await caller.send(make([1, 1], [2, 2]), make([3, 3]))
    await until(lambda: worker.scheduler.in_hand == 2)
    worker.scheduler.use(worker.model)
    await until(lambda: len(caller.replies) == 2)
    assert worker.model.calls == [ids, [ids[0]], [ids[1]]]
    # Alone, it is what the model says: an answer without a batch axis.
    assert [caller.reply(id_).rows for id_ in ids] == [0, 1]
    await nothing_is_left(worker)


async def test_without_a_batch_axis_requests_are_called_alone(
    start, caller, make, shown, until, nothing_is_left
):
    worker = await start(max_rows=0)
    ids = await caller.send(*(make([n, n], batched=False) for n in range(20)))
    await until(lambda: len(caller.replies) == 20)
    assert [shown(caller.reply(id_)) for id_ in ids] == [[[2 * n, 2 * n]] for n in range(20)]
    assert all(caller.reply(id_).rows == 0 for id_ in ids)
    assert sorted(worker.model.calls) == sorted([id_] for id_ in ids)
    await nothing_is_left(worker)


async def test_expired_requests_are_not_called(start, caller, make, until, nothing_is_left):
    worker = await start(serving=False)
    late, gone = make([1, 1], deadline_ms=1), make([2, 2], deadline_ms=int(time.time() * 1e3) - 1)
    (_, _, live) = await caller.send(late, gone, make([3, 3]))
    await until(lambda: worker.scheduler.in_hand == 3)
    worker.scheduler.use(worker.model)
    await until(lambda: caller.reply(live))
    assert worker.model.calls == [[live]]
    assert list(caller.replies) == [live], "nobody waits for the others"
    await nothing_is_left(worker)


async def test_a_deadline_within_the_call(start, caller, make, until, nothing_is_left):
    worker = await start()

    def fail(_) -> None:
        raise DeadlinePassed("late")

    worker.model.fail = fail
    await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls and worker.scheduler.in_hand == 0)
    assert caller.replies == {}
    await nothing_is_left(worker)


async def test_cancelled_requests_are_not_called(start, caller, make, until, nothing_is_left):
    worker = await start()
    worker.model.open.clear()
    (first,) = await caller.send(make([1, 1]))
    await until(lambda: worker.model.calls)
    cancelled, wanted = await caller.send(make([2, 2]), make([3, 3]))
    await until(lambda: worker.scheduler.in_hand == 3)
    await caller.cancel(cancelled, os.urandom(16))
    await until(lambda: cancelled in worker.scheduler._cancelled)
    worker.model.open.set()
    await until(lambda: caller.reply(wanted))
    assert worker.model.calls == [[first], [wanted]]
    assert sorted(caller.replies) == sorted([first, wanted])
    await nothing_is_left(worker)


async def test_a_call_is_cancelled_when_all_its_callers_have_cancelled(
    start, caller, make, until, nothing_is_left
):
    worker = await start(serving=False)
    worker.model.open.clear()
    one, other = await caller.send(make([1, 1]), make([2, 2]))
    await until(lambda: worker.scheduler.in_hand == 2)
    worker.scheduler.use(worker.model)
    await until(lambda: worker.model.calls == [[one, other]])
    await caller.cancel(one)
    await until(lambda: one in worker.scheduler._cancelled)
    assert worker.model.cancelled == 0, "somebody still waits"
    await caller.cancel(other)
    await until(lambda: worker.model.cancelled == 1)
    worker.model.open.set()
    (third,) = await caller.send(make([3, 3]))
    await until(lambda: caller.reply(third))
    assert list(caller.replies) == [third]
    await nothing_is_left(worker)


async def test_an_undecodable_cancel_is_ignored(start, caller, make, until):
    await start()
    for body in (b"", b"garbage", envelope.pack(envelope.REPLIES, [])):
        await caller.channel.publish(body, exchange="tidegate.cancels.v1", routing_key="")
    (id_,) = await caller.send(make([1, 1]))
    await until(lambda: caller.reply(id_))


async def test_replies_to_a_gateway_that_has_ended_are_dropped(start, caller, make, until, nothing_is_left):
    """Other gateways get their replies."""
    worker = await start()
    here, caller.reply_to = caller.reply_to, replies_queue("gone")
    await caller.send(make([1, 1]))
    caller.reply_to = here
    (id_,) = await caller.send(make([2, 2]))
    await until(lambda: caller.reply(id_))
    await nothing_is_left(worker)


async def test_a_full_call_does_not_wait_for_its_window(start, caller, make, until):
    worker = await start(window_s=15.0, max_rows=4)
    ids = [(await caller.send(make([n, n])))[0] for n in range(2)]
    ids += await caller.send(make([2, 2], [2, 2]))
    await until(lambda: len(caller.replies) == 3, patience_s=10)
    assert worker.model.calls == [ids]


async def test_a_partial_call_starts_at_the_end_of_its_window(start, caller, make, until):
    worker = await start(window_s=0.1)
    started = time.monotonic()
    one, other = await caller.send(make([1, 1]), make([2, 2]))
    await until(lambda: len(caller.replies) == 2)
    assert time.monotonic() - started >= 0.1
    assert worker.model.calls == [[one, other]]


@pytest.mark.parametrize(
    ("max_rows", "limit", "together"), [(0, 3, 3), (2, 3, 3), (2, 100, 4), (4, 4, 4), (8, None, 16)]
)
async def test_max_concurrency_bounds_requests_in_calls(
    start, caller, make, until, max_rows, limit, together
):
    """``max_concurrency`` of a Deployment applies to all calls of a replica together."""
    worker = await start(max_rows=max_rows, instances=2, max_concurrency=limit, serving=False)
    worker.scheduler.stats.call_ms.add(0.1)
    worker.model.open.clear()
    await caller.send(*(make([n, n], batched=max_rows > 0) for n in range(20)))
    await until(lambda: worker.scheduler.in_hand == 20)
    worker.scheduler.use(worker.model)
    await until(lambda: sum(map(len, worker.model.calls)) >= together)
    await asyncio.sleep(0.05)
    assert sum(map(len, worker.model.calls)) == together
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 20)


async def test_calls_in_flight_are_bounded(start, caller, make, until):
    worker = await start(instances=2, max_rows=1)
    worker.model.open.clear()
    await caller.send(*(make([n, n]) for n in range(6)))
    await until(lambda: worker.scheduler.in_hand == 6)
    await until(lambda: len(worker.model.calls) == 2)
    await asyncio.sleep(0)
    assert len(worker.model.calls) == 2
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 6)


async def test_the_parameters_of_an_answer(start, caller, make, until, nothing_is_left):
    """A request alone gets all parameters; in a shared call it gets its share of the tokens, by rows."""
    worker = await start()
    worker.model.parameters = {"prompt_tokens": 31, "finish_reason": "stop"}
    (alone,) = await caller.send(make([1, 1]))
    await until(lambda: caller.reply(alone))
    assert envelope.read_result_key(caller.reply(alone).key)[1] == worker.model.parameters
    worker.model.open.clear()
    await caller.send(make([0, 0]))
    await until(lambda: len(worker.model.calls) == 2)
    ids = await caller.send(make([1, 1]), make([2, 2], [3, 3]))
    await until(lambda: worker.scheduler.in_hand == 3)
    worker.model.open.set()
    await until(lambda: all(caller.reply(id_) for id_ in ids))
    found = [envelope.read_result_key(caller.reply(id_).key)[1] for id_ in ids]
    assert found == [
        {"prompt_tokens": 10, "finish_reason": "stop"},
        {"prompt_tokens": 21, "finish_reason": "stop"},
    ]
    await nothing_is_left(worker)


async def test_parameters_that_are_too_long_are_an_error_of_the_model(start, caller, make, failure, until):
    worker = await start()
    worker.model.parameters = {"text": "x" * envelope.MAX_KEY}
    (id_,) = await caller.send(make([1, 1]))
    reply = await until(lambda: caller.reply(id_))
    assert failure(reply)[0] == "model_failed"
    assert "parameters of an answer have" in failure(reply)[1]
