"""Fetch the data of a reply from the blob store, if the reply has a claim instead of the data."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Container, Coroutine
from typing import Any

from services.gateway.domain.memory_budget import MemoryBudget
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.envelope import Reply

ROOM_POLL_S = 0.01


class ReplyClaimFetcher:
    """A fetcher of reply data. It waits until the data fits in the memory budget ``answers``.

    The replies to one request are passed on in their order.
    """

    def __init__(
        self,
        claims: Claims,
        answers: MemoryBudget,
        in_flight: Container[bytes],
        *,
        on_reply: Callable[[Reply], None],
        on_failure: Callable[[bytes, TidegateError], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """``in_flight``: the ids of the requests in flight. Replies to other requests are not fetched."""
        self._claims = claims
        self._answers = answers
        self._in_flight = in_flight
        self._on_reply = on_reply
        self._on_failure = on_failure
        self._spawn = spawn
        # The replies to pass on, by request id. A reply waits for its own fetch and for all earlier replies
        # to the same request.
        self.queued: dict[bytes, deque[Reply]] = {}

    def add(self, reply: Reply) -> None:
        """Pass a reply on once its data is fetched. The replies to one request keep their order."""
        replies = self.queued.get(reply.id)
        if replies is not None:
            replies.append(reply)
        else:
            self.queued[reply.id] = deque((reply,))
            self._spawn(self._fetch_all(reply.id))

    async def _fetch_all(self, id_: bytes) -> None:
        replies = self.queued[id_]
        try:
            while replies:
                reply = replies.popleft()
                if reply.claimed:
                    await self._fetch(reply)
                    self._spawn(self._claims.drop(reply.data[0]))
                else:
                    self._on_reply(reply)
        finally:
            del self.queued[id_]

    async def _fetch(self, reply: Reply) -> None:
        size = self._claims.size(reply.data)
        while reply.id in self._in_flight and not self._answers.take(size):
            if not self._answers.used:
                self._answers.force(size)  # larger than the whole budget: fetch it alone
                break
            await asyncio.sleep(ROOM_POLL_S)
        if reply.id not in self._in_flight:
            return
        try:
            data = await self._claims.redeem(reply.data)
            self._on_reply(reply._replace(data=data))
        except Unavailable as error:
            self._on_failure(reply.id, error)
        finally:
            self._answers.release(size)
