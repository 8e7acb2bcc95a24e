"""Requests and replies that are too large for a message travel as claims."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.memory_budget import MemoryBudget
from tests.integration.gateway.conftest import CLAIM_ABOVE, submit
from tests.integration.gateway.process import echo
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import DeadlinePassed, TidegateError, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, call_key, tensor

pytestmark = pytest.mark.integration

KEY = call_key((tensor("x", "UINT8", (-1,)),), (), {})


def send(dispatcher: Dispatcher, route, data: bytes, timeout_s: float = 20):
    return submit(dispatcher, route, 0, KEY, data, timeout_s, b"t")


def blobs_of(folder: Path) -> list[Path]:
    return list((folder / "blobs").glob("*/*"))


def reply(request, data: bytes, **fields) -> Reply:
    key = envelope.result_key((tensor("y", "UINT8", (-1,)),))
    return Reply(request.id, envelope.OK, request.attempt, 0, 0, 1, 2, 1, key, [data], **fields)


async def answer(peer, request, *replies: Reply) -> None:
    for each in replies:
        frame = b"".join(envelope.reply_pieces(each))
        delivery = peer.deliveries[-1]
        await peer.connection.channel.publish(
            envelope.pack(envelope.REPLIES, [frame]), routing_key=delivery.reply_to
        )


async def test_a_large_request_is_sent_as_a_claim(dispatch, peer, route, claims, tmp_path, until):
    data = os.urandom(CLAIM_ABOVE + 1)
    dispatcher = await dispatch()
    peer.answer = lambda request: None if request.flags & envelope.CLAIM else echo(request)
    _, future = send(dispatcher, route(), data)
    # Smaller requests do not wait for the upload, and do not share its envelope.
    small = [send(dispatcher, route(), b"s")[1] for _ in range(3)]
    await asyncio.gather(*small)
    await until(lambda: len(peer.requests) == 4)
    (claimed,) = [r for r in peer.requests if r.flags & envelope.CLAIM]
    assert len(claimed.raw) < 300
    assert [bytes(part) for part in await claims.redeem(claimed.data)] == [data]
    assert all(len(frames) == 1 for frames in peer.envelopes if claimed in frames)
    await answer(peer, claimed, reply(claimed, b"done"))
    await future
    await until(lambda: not blobs_of(tmp_path), "it is answered, and its blob not needed any more")


@pytest.mark.parametrize("size", [envelope.LARGE, envelope.LARGE + 1, CLAIM_ABOVE])
async def test_a_request_at_the_limit_is_sent_in_the_message(dispatch, peer, route, tmp_path, size):
    data = os.urandom(size)
    _, future = send(await dispatch(), route(), data)
    assert bytes((await future).data[0]) == data
    assert not peer.requests[0].flags & envelope.CLAIM
    assert not blobs_of(tmp_path)


async def test_a_claimed_reply_is_redeemed(dispatch, peer, route, claims, tmp_path, until):
    peer.answer = lambda _: None
    _, future = send(await dispatch(), route(), b"small")
    await until(lambda: peer.requests)
    data = os.urandom(CLAIM_ABOVE * 2)
    claim = await claims.give([data], 10)
    await answer(peer, peer.requests[0], reply(peer.requests[0], claim, claimed=True))
    found = await future
    assert bytes(found.data[0]) == data
    await until(lambda: not blobs_of(tmp_path))


async def test_a_reply_whose_blob_is_missing(dispatch, peer, route, claims, tmp_path, until):
    peer.answer = lambda _: None
    _, future = send(await dispatch(), route(), b"small")
    await until(lambda: peer.requests)
    claim = await claims.give([b"x" * 10], 10)
    await claims.drop(claim)
    await answer(peer, peer.requests[0], reply(peer.requests[0], claim, claimed=True))
    with pytest.raises(Unavailable, match="not in the blob store any more"):
        await future


async def test_a_store_that_cannot_be_written(dispatch, peer, route, tmp_path):
    (tmp_path / "blobs").write_text("in the way")
    _, future = send(await dispatch(), route(), bytes(CLAIM_ABOVE + 1))
    with pytest.raises(Unavailable, match="the blob store cannot be written"):
        await future
    assert peer.requests == []


async def test_an_abandoned_request_leaves_no_blob(dispatch, peer, route, tmp_path, until):
    peer.answer = lambda _: None
    dispatcher = await dispatch()
    id_, _ = send(dispatcher, route(), bytes(CLAIM_ABOVE + 1))
    dispatcher.abandon(id_)
    id_, _ = send(dispatcher, route(), bytes(CLAIM_ABOVE + 1))
    await until(lambda: peer.requests)
    dispatcher.abandon(id_)
    await until(lambda: not blobs_of(tmp_path))


async def test_after_the_deadline_there_is_no_blob(dispatch, peer, route, tmp_path, until):
    peer.answer = lambda _: None
    _, future = send(await dispatch(), route(), bytes(CLAIM_ABOVE + 1), timeout_s=0.3)
    with pytest.raises(DeadlinePassed):
        await future
    await until(lambda: not blobs_of(tmp_path))


async def test_the_claim_is_sent_again_after_a_reconnect(dispatch, line, peer, route, claims, until):
    peer.answer = lambda _: None
    dispatcher = await dispatch(line.url)
    data = os.urandom(CLAIM_ABOVE + 1)
    _, future = send(dispatcher, route(), data)
    await until(lambda: len(peer.requests) == 1)
    line.cut()
    await until(lambda: len(peer.requests) == 2)
    again = peer.requests[1]
    assert again.raw == peer.requests[0].raw
    assert [bytes(part) for part in await claims.redeem(again.data)] == [data]
    await answer(peer, again, reply(again, b"done"))
    assert bytes((await future).data[0]) == b"done"


async def test_claimed_answers_wait_for_memory(dispatch, peer, route, claims, until):
    """Two answers that do not fit together are fetched one after the other."""
    peer.answer = lambda _: None
    answers = MemoryBudget(CLAIM_ABOVE + 10)
    dispatcher = await dispatch(answers=answers)
    answers.force(CLAIM_ABOVE)  # an unread answer
    futures = [send(dispatcher, route(), b"s")[1] for _ in range(2)]
    await until(lambda: len(peer.requests) == 2)
    for request in peer.requests:
        await answer(peer, request, reply(request, await claims.give([bytes(CLAIM_ABOVE)], 10), claimed=True))
    done, _ = await asyncio.wait(futures, timeout=0.3)
    assert not done
    answers.release(CLAIM_ABOVE)
    for found in await asyncio.gather(*futures):
        assert len(found.data[0]) == CLAIM_ABOVE
    assert answers.used == 0


async def test_a_claim_of_another_store(dispatch, peer, route, tmp_path, until):
    """Gateway and worker with different stores: an error, never a hang."""
    peer.answer = lambda _: None
    _, future = send(await dispatch(), route(), b"s")
    await until(lambda: peer.requests)
    elsewhere = Blobs(f"file://{tmp_path}/elsewhere")
    claim = await Claims(elsewhere, 1).give([b"data"], 10)
    elsewhere.close()
    await answer(peer, peer.requests[0], reply(peer.requests[0], claim, claimed=True))
    with pytest.raises(TidegateError, match="use different stores"):
        await future
