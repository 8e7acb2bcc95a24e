"""Replies whose data is in the blob store, fetched before their callers see them."""

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
    """Fetches within a budget. The replies of one request stay in order: see ``behind``."""

    def __init__(
        self,
        claims: Claims,
        answers: MemoryBudget,
        waiting: Container[bytes],
        *,
        on_reply: Callable[[Reply], None],
        on_failure: Callable[[bytes, TidegateError], None],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """``waiting``: ids of the requests that somebody waits for."""
        self._claims = claims
        self._answers = answers
        self._waiting = waiting
        self._on_reply = on_reply
        self._on_failure = on_failure
        self._spawn = spawn
        # By id: replies that wait here. Those that come after them must be taken too, claimed or not.
        self.behind: dict[bytes, deque[Reply]] = {}

    def take(self, reply: Reply) -> None:
        """Give it on when its data is there, behind those of its request that came before."""
        behind = self.behind.get(reply.id)
        if behind is not None:
            behind.append(reply)
        else:
            self.behind[reply.id] = deque((reply,))
            self._spawn(self._redeem(reply.id))

    async def _redeem(self, id_: bytes) -> None:
        replies = self.behind[id_]
        try:
            while replies:
                reply = replies.popleft()
                if reply.claimed:
                    await self._redeem_one(reply)
                    self._spawn(self._claims.drop(reply.data[0]))
                else:
                    self._on_reply(reply)
        finally:
            del self.behind[id_]

    async def _redeem_one(self, reply: Reply) -> None:
        size = self._claims.size(reply.data)
        while reply.id in self._waiting and not self._answers.take(size):
            if not self._answers.used:
                self._answers.force(size)  # larger than the limit: alone
                break
            await asyncio.sleep(ROOM_POLL_S)
        if reply.id not in self._waiting:
            return
        try:
            data = await self._claims.redeem(reply.data)
            self._on_reply(reply._replace(data=data))
        except Unavailable as error:
            self._on_failure(reply.id, error)
        finally:
            self._answers.give(size)
