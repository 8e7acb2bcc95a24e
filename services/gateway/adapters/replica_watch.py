"""Detect that a replica has ended while requests wait in its queue, which no other replica reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import Queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

LOOK_S = 0.4
# A replica counts as ended if this many checks in a row find no consumer at its queue. One check is not
# enough, because a worker that reconnects to the broker has no consumer for a moment.
LOOKS = 2
# For this many seconds after the gateway has reconnected to the broker, no replica counts as ended. Workers
# try to reconnect every two seconds, so they can be later than the gateway.
BACK_S = 5.0


class ReplicaWatch:
    """Watch the requests in queues that only one replica reads, and report those of ended replicas.

    ``on_lost``: called with the id of each request whose replica has ended.
    """

    def __init__(self, connection: Callable[[], Connection], on_lost: Callable[[bytes], None]) -> None:
        self._connection = connection
        self._on_lost = on_lost
        self._waiting: dict[str, dict[bytes, float]] = {}
        self._queues: dict[str, Queue] = {}
        self._channel: Channel | None = None
        self._back_at = float("-inf")
        self._declared: set[str] = set()
        self._tasks = TaskSet()
        self._running = False

    async def declare(self, queue: Queue) -> None:
        """Declare the queue of a replica, so that messages can be sent to it.

        Raise Unavailable if the broker is not connected.
        """
        connection = self._connection()
        channel = connection.channel
        if channel is None:
            raise Unavailable(connection.problem or "the broker is not connected", retry_after_s=1.0)
        self._note(channel)
        if queue.name not in self._declared:
            await channel.declare(queue)
            self._declared.add(queue.name)

    def _note(self, channel: Channel) -> None:
        """Record a new channel. If it replaces another channel, record the time of the reconnect, too."""
        if self._channel is not channel:
            if self._channel is not None:
                self._back_at = time.monotonic()
            self._channel, self._declared = channel, set()

    async def has_ended(self, queue: Queue) -> bool:
        """Return True if a replica's queue has no consumer now.

        Return False if the broker is not connected. Raise Unavailable if the broker does not answer.
        """
        channel = self._connection().channel
        return channel is not None and not await channel.consumers(queue)

    def begin(self, queue: Queue, id_: bytes) -> None:
        """Watch a request that was just sent."""
        self._waiting.setdefault(queue.name, {})[id_] = time.monotonic()
        self._queues[queue.name] = queue
        if not self._running:
            self._running = True
            self._tasks.start(self._run(), "watch replicas")

    def end(self, queue: Queue, id_: bytes) -> None:
        """Stop watching a request, because it has ended."""
        waiting = self._waiting.get(queue.name)
        if waiting is not None:
            waiting.pop(id_, None)
            if not waiting:
                del self._waiting[queue.name], self._queues[queue.name]

    async def stop(self) -> None:
        """Stop watching."""
        await self._tasks.end()

    async def _run(self) -> None:
        silent: dict[str, int] = {}
        try:
            while self._waiting:
                await asyncio.sleep(LOOK_S)
                silent = await self._look(silent)
        finally:
            self._running = False

    async def _look(self, silent: dict[str, int]) -> dict[str, int]:
        """Count the consumers of the queues, and report the requests of replicas that have ended.

        Return the queues without a consumer. The value of each queue is the number of checks in a row that
        found no consumer. ``silent``: the return value of the previous call.
        """
        before, found = time.monotonic() - LOOK_S / 2, dict[str, int]()
        for name, waiting in list(self._waiting.items()):
            channel = self._connection().channel
            if channel is None or min(waiting.values(), default=before) >= before:
                continue
            self._note(channel)
            if time.monotonic() - self._back_at < BACK_S:
                continue
            try:
                consumers = await channel.consumers(self._queues[name])
            except (Unavailable, KeyError):  # the broker is away, or the last request has just ended
                continue
            if consumers:
                continue
            found[name] = silent.get(name, 0) + 1
            if found[name] >= LOOKS:
                log.warning("a replica that kept sequences has ended", extra={"queue": name})
                for id_ in list(self._waiting.get(name, ())):
                    self._on_lost(id_)
        return found
