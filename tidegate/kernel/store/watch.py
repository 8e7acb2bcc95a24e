"""Notify about changes of jobs, over one subscribing connection per process."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tidegate.kernel import tasks
from tidegate.kernel.store.connection import OPERATION_TIMEOUT_S, StoreUnavailable, connect

PING_S = 5.0
SILENCE_S = 15.0
BACKOFF_S = (0.05, 2.0)


class JobChanges:
    """An endless asynchronous iterator that yields after a job has changed.

    If the job changes several times between two reads, the iterator yields only once.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        """Notify that the job may have changed."""
        self._changed.set()

    def __aiter__(self) -> JobChanges:
        return self

    async def __anext__(self) -> None:
        await self._changed.wait()
        self._changed.clear()


class JobWatch:
    """A subscription to changes of jobs.

    It connects on first use. After each reconnect, it notifies every watcher, because the watcher's job may
    have changed while there was no connection.
    """

    def __init__(self, url: str, channel: bytes) -> None:
        self._url = url
        self._channel = channel
        self._watchers: dict[bytes, set[JobChanges]] = {}
        self._confirmed: dict[bytes, asyncio.Event] = {}
        self._open: Counter[bytes] = Counter()  # by job: the number of unconfirmed SUBSCRIBE commands
        self._connection: Any = None
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def changes(self, id: bytes) -> AsyncIterator[JobChanges]:
        """Subscribe to the changes of a job during the ``async with`` block.

        The calling code must read the job inside the block, because changes before the block are not
        announced. Each notice says only that the job may have changed. If the store fails, the iterator waits
        and continues after the reconnect. Raises ``StoreUnavailable`` if the subscription fails.
        """
        notices = JobChanges()
        self._watchers.setdefault(id, set()).add(notices)
        try:
            await self._subscribed(id)
            yield notices
        finally:
            self._watchers[id].discard(notices)
            if not self._watchers[id]:
                del self._watchers[id]
                del self._confirmed[id]
                await self._send("UNSUBSCRIBE", [id])

    async def close(self) -> None:
        """End the subscription.

        After this, a loop over :class:`JobChanges` that still runs waits forever.
        """
        await tasks.end(self._task)

    async def _subscribed(self, id: bytes) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="watch")
        confirmed = self._confirmed.get(id)
        if confirmed is None:
            confirmed = self._confirmed[id] = asyncio.Event()
            await self._send("SUBSCRIBE", [id])
        try:
            async with asyncio.timeout(OPERATION_TIMEOUT_S):
                await confirmed.wait()
        except TimeoutError:
            raise StoreUnavailable("The store does not announce changes.") from None

    async def _send(self, command: str, ids: list[bytes]) -> None:
        if self._connection is None:
            return  # send nothing: the reconnect will subscribe to all watched jobs
        if command == "SUBSCRIBE":
            self._open.update(ids)
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            await self._connection.send_command(command, *(self._channel + id_ for id_ in ids))

    async def _run(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with connect(self._url) as redis:
                    await self._listen(redis)
            # Reconnect soon if the connection worked. Otherwise, wait longer after each failure.
            delay = BACKOFF_S[0] if self._connection is not None else min(delay * 2, BACKOFF_S[1])
            self._connection = None
            await asyncio.sleep(delay)

    async def _listen(self, redis: Redis) -> None:
        connection = redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        pings: asyncio.Task[None] | None = None
        try:
            await connection.connect()
            self._connection = connection
            self._open.clear()
            if self._watchers:
                await self._send("SUBSCRIBE", list(self._watchers))
            for watchers in self._watchers.values():
                for notices in watchers:
                    notices.tell()
            pings = asyncio.create_task(self._ping(connection), name="watch ping")
            while True:
                self._on_message(await connection.read_response(timeout=SILENCE_S))
        finally:
            await tasks.end(pings)
            await connection.disconnect()

    async def _ping(self, connection: Any) -> None:
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            while True:
                await asyncio.sleep(PING_S)
                await connection.send_command("PING")

    def _on_message(self, message: Any) -> None:
        if not isinstance(message, list):
            return  # the answer to a ping while nothing is subscribed
        kind, id_ = message[0], message[1][len(self._channel) :]
        if kind == b"subscribe":
            self._open[id_] -= 1
            if self._open[id_] <= 0:
                del self._open[id_]
                if id_ in self._confirmed:
                    self._confirmed[id_].set()
        elif kind == b"message":
            for notices in self._watchers.get(id_, ()):
                notices.tell()
