"""Sends the chunks of language models' streams. The streams do not wait for the broker's confirms."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from services.worker.adapters.reply_publisher import ReplyPublisher
from tidegate.kernel import telemetry
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

# The replies to one gateway process that wait for the broker. At more bytes, the streams wait.
MAX_WAITING_BYTES = envelope.LARGE


class GatewayReplies:
    """The replies to one gateway process that wait. ``confirmed`` is done when the broker has them."""

    def __init__(self) -> None:
        self.frames: list[Buffer] = []
        self.size = 0
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, frame: Buffer) -> None:
        """Add a reply."""
        self.frames.append(frame)
        self.size += len(frame)

    def take(self) -> tuple[list[Buffer], asyncio.Future[None]]:
        """Remove and return all replies, and the future of their confirm."""
        taken = self.frames, self.confirmed
        self.frames, self.size = [], 0
        self.confirmed = asyncio.get_running_loop().create_future()
        return taken

    def end(self) -> None:
        """Let the streams that wait go on."""
        if not self.confirmed.done():
            self.confirmed.set_result(None)


class ChunkSender:
    """Sends replies to each gateway process in their order, with one message at a time on its way.

    Replies that become ready meanwhile share the next message. So a stream waits for no confirm. A message
    that is published again after a reconnect never arrives after a later one.
    """

    def __init__(self, publisher: ReplyPublisher) -> None:
        self._publisher = publisher
        self._waiting: dict[str, GatewayReplies] = {}
        self._tasks = TaskSet()

    async def stop(self) -> None:
        """Stop sending, and let the streams that wait go on."""
        await self._tasks.end()

    async def reply(self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float) -> None:
        """Send replies. Return at once, unless many bytes wait for the broker or a reply is large.

        ``left_s``: how long the caller of a large reply still waits.
        """
        for frame in frames:
            if isinstance(frame, Reply) or len(frame) > envelope.LARGE:
                await self.confirmed(reply_to)
                await self._publisher.reply(reply_to, [frame], left_s=left_s)
                continue
            self._add(reply_to, frame)
            if self._waiting[reply_to].size > MAX_WAITING_BYTES:
                await self.confirmed(reply_to)

    async def reply_last(self, reply_to: str, frame: Buffer) -> None:
        """Send the last reply of a stream. Return when the broker has it, and all before it."""
        self._add(reply_to, frame)
        await self.confirmed(reply_to)

    async def confirmed(self, reply_to: str) -> None:
        """Return when the broker has all replies to a gateway process that were added before."""
        waiting = self._waiting.get(reply_to)
        if waiting is not None:
            # Several streams share the future, so one that is cancelled must not cancel it.
            await asyncio.shield(waiting.confirmed)

    def _add(self, reply_to: str, frame: Buffer) -> None:
        waiting = self._waiting.get(reply_to)
        if waiting is None:
            waiting = self._waiting[reply_to] = GatewayReplies()
            task = self._tasks.start(self._send(reply_to, waiting), "send chunks")
            # A task that is cancelled before it begins does not reach its own end.
            task.add_done_callback(partial(self._end, reply_to, waiting))
        waiting.add(frame)

    async def _send(self, reply_to: str, waiting: GatewayReplies) -> None:
        try:
            while waiting.frames:
                frames, confirmed = waiting.take()
                try:
                    await self._publisher.reply(reply_to, frames)
                except Exception:  # the gateway sees the gap; the other streams go on
                    log.exception("chunks were not sent", extra={"queue": reply_to})
                finally:
                    confirmed.set_result(None)
        finally:
            self._end(reply_to, waiting)

    def _end(self, reply_to: str, waiting: GatewayReplies, _: object = None) -> None:
        if self._waiting.get(reply_to) is waiting:
            del self._waiting[reply_to]
        waiting.end()
