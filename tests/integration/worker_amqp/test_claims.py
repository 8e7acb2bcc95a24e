"""Requests and answers too large for a message: fetched, answered, retried, and settled once."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from services.worker.domain import retry_after_loss
from tests.integration.worker_amqp.conftest import CLAIM_ABOVE
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.integration

SAFE_CLAIM = envelope.RETRY_SAFE | envelope.CLAIM


@pytest.fixture
def claimed(make, claims):
    """Return ``await claimed([1, 1], ...)``: the frame of ``make`` with its data in the blob store."""

    async def framed(*rows, flags: int = SAFE_CLAIM, **given) -> tuple[bytes, bytes]:
        request = envelope.read_request(make(*rows, **given))
        claim = await claims.give(request.data, 30)
        head = envelope.request_frame(
            request.id, request.deadline_ms, request.rows, request.key, [claim], flags=flags
        )
        return head, claim

    return framed


async def test_the_model_sees_the_tensors(start, caller, claimed, make, shown, until, nothing_is_left):
    """A request with a claim shares envelopes and calls with others."""
    worker = await start()
    worker.model.open.clear()
    first = make([9, 9])
    frames = [(await claimed([n, n]))[0] for n in range(3)]
    ids = await caller.send(first, *frames, make([3, 3]))
    await until(lambda: worker.scheduler.in_hand == 5)
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 5)
    assert [shown(caller.reply(id_)) for id_ in ids] == [[[2 * n, 2 * n]] for n in (9, 0, 1, 2, 3)]
    assert len(worker.model.calls) < 5
    await nothing_is_left(worker)


async def test_a_missing_blob_is_reported_once(
    start, caller, claims, claimed, make, failure, until, nothing_is_left
):
    worker = await start()
    frame, claim = await claimed([1, 1])
    await claims.drop(claim)
    missing, other = await caller.send(frame, make([2, 2]))
    await until(lambda: len(caller.replies) == 2)
    reason, message = failure(caller.reply(missing))
    assert (reason, "not in the blob store any more" in message) == ("unavailable", True)
    assert caller.reply(other).status == envelope.OK
    await nothing_is_left(worker)


async def test_an_invalid_claim_is_reported(start, caller, make, failure, until, nothing_is_left):
    worker = await start()
    (id_,) = await caller.send(make([1, 1], flags=SAFE_CLAIM))
    await until(lambda: caller.replies)
    assert failure(caller.reply(id_))[0] == "unavailable"
    await nothing_is_left(worker)


async def test_a_large_answer_goes_by_claim(start, caller, claims, make, until, nothing_is_left):
    worker = await start()
    data = np.arange(CLAIM_ABOVE, dtype="<f4")
    for size in (CLAIM_ABOVE // 4 + 2, CLAIM_ABOVE // 4, envelope.LARGE // 4 + 2):
        caller.replies.clear()
        (id_,) = await caller.send(make(data[:size], batched=False))
        await until(lambda: caller.replies)
        reply = caller.reply(id_)
        assert reply.claimed == (size * 4 > CLAIM_ABOVE)
        (raw,) = await claims.redeem(reply.data) if reply.claimed else reply.data
        assert (np.frombuffer(raw, "<f4") == data[:size] * 2).all()
    await nothing_is_left(worker)


async def test_many_medium_answers_travel_in_several_messages(start, caller, make, until, monkeypatch):
    """Together they would exceed the broker's limit for a message."""
    worker = await start()
    sizes: list[int] = []
    publish = worker.publisher._publish

    async def seen(body, *args, **given):
        sizes.append(sum(map(len, body)) if isinstance(body, list) else len(body))
        await publish(body, *args, **given)

    monkeypatch.setattr(worker.publisher, "_publish", seen)
    frames = [
        envelope.reply_frame(bytes([n]) * 16, 0, 0, envelope.result_key(()), [bytes(100_000)])
        for n in range(8)
    ]
    await worker.publisher.reply(caller.reply_to.name, frames)
    await until(lambda: len(caller.replies) == 8)
    assert len(sizes) == 4
    assert max(sizes) < envelope.LARGE


async def test_an_answer_that_cannot_be_stored_is_an_error(
    start, caller, make, failure, until, tmp_path, nothing_is_left
):
    worker = await start()
    (tmp_path / "blobs").write_text("in the way")
    (id_,) = await caller.send(make(np.zeros(CLAIM_ABOVE, "<f4"), batched=False))
    await until(lambda: caller.replies)
    assert failure(caller.reply(id_))[0] == "unavailable"
    await nothing_is_left(worker)


async def test_the_next_worker_fetches_the_claim_again(start, caller, claimed, shown, until, nothing_is_left):
    first = await start()
    first.model.open.clear()
    frame, _ = await claimed([4, 4])
    (id_,) = await caller.send(frame)
    await until(lambda: first.model.calls)
    await first.die()
    second = await start()
    await until(lambda: caller.replies)
    assert (caller.reply(id_).attempt, shown(caller.reply(id_))) == (1, [[8, 8]])
    await nothing_is_left(second)


async def test_a_suspect_does_not_wait_for_fetched_bytes_to_be_released(
    start, caller, claimed, make, until, nothing_is_left
):
    """A request that fills the bound runs only after the suspects, so they would wait for each other."""
    worker = await start(fetch_bytes=10, serving=False)
    worker.model.open.clear()
    plain, (large, _) = make([3, 3]), await claimed([2, 2])
    for lost in (plain, large):
        await worker.publisher.retry_or_give_up(
            envelope.read_request(lost), caller.reply_to.name, alone=False
        )
    worker.scheduler.use(worker.model)
    await until(lambda: worker.model.calls == [[plain[:16]]])
    held, _ = await claimed([1, 1])
    await caller.send(held)
    await until(lambda: worker.scheduler.in_hand == 2)
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 3)
    assert worker.model.calls == [[plain[:16]], [large[:16]], [held[:16]]]
    await nothing_is_left(worker)


async def test_a_dead_letter_keeps_its_claim(start, caller, exceptions, claimed, until):
    frame, _ = await claimed([1, 1])
    await caller.send(frame)
    for _ in range(retry_after_loss.MAX_ATTEMPTS):
        worker = await start(serving=False)
        worker.model.open.clear()
        worker.scheduler.use(worker.model)
        await until(lambda w=worker: w.model.calls)
        await worker.die()
    await start()
    (letter,) = await until(lambda: exceptions.got)
    (given_up,) = envelope.unpack(envelope.REQUESTS, letter.body)
    assert bytes(given_up) == envelope.with_attempt(frame, retry_after_loss.MAX_ATTEMPTS)


async def test_a_request_expires_while_it_waits_to_be_fetched(start, caller, claimed, until, nothing_is_left):
    """One request in hand fills the bound; the deadline of the next one passes before it is fetched."""
    worker = await start(fetch_bytes=10, serving=False)
    first, _ = await claimed([1, 1])
    second, _ = await claimed([2, 2], deadline_ms=int((time.time() + 1.0) * 1e3))
    one, two = await caller.send(first, second)
    await until(lambda: worker.scheduler.in_hand == 1)
    await asyncio.sleep(1.1)
    worker.scheduler.use(worker.model)
    await until(lambda: caller.reply(one))
    await nothing_is_left(worker)
    assert caller.reply(two) is None


async def test_fetched_bytes_are_bounded(start, caller, claimed, until, nothing_is_left):
    worker = await start(fetch_bytes=16)
    worker.model.open.clear()
    await caller.send(*[(await claimed([n, n]))[0] for n in range(6)])
    await until(lambda: worker.scheduler.in_hand == 2)
    await asyncio.sleep(0.1)
    assert worker.scheduler.in_hand == 2
    worker.model.open.set()
    await until(lambda: len(caller.replies) == 6)
    await nothing_is_left(worker)


async def test_a_lost_connection_releases_fetched_bytes(start, caller, line, claimed, shown, until):
    worker = await start(in_url=line.url, fetch_bytes=8)
    worker.model.open.clear()
    frames = [(await claimed([n, n]))[0] for n in range(3)]
    ids = await caller.send(*frames)
    await until(lambda: worker.scheduler.in_hand == 1)
    line.cut()
    worker.model.open.set()
    await until(lambda: all(id_ in caller.replies for id_ in ids))
    assert [shown(caller.replies[id_][-1]) for id_ in ids] == [[[2 * n, 2 * n]] for n in range(3)]
    await until(lambda: worker.requests.unsettled == 0 and not worker.requests._claim_fetcher._held_bytes)
