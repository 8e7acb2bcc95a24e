"""Send the chunks of language models' streams, without waiting for the broker's confirm of each chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from services.worker.adapters.reply_publisher import GatewayGone, ReplyPublisher
from tidegate.kernel import telemetry
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

# At most this many bytes of replies wait to be sent to one gateway process. Above this limit, streams wait
# for the broker, so that memory does not grow.
MAX_WAITING_BYTES = envelope.LARGE


class GatewayReplies:
    """Replies that wait to be sent to one gateway process.

    ``confirmed`` completes when the broker has confirmed these replies, or when they could not be sent.
    """

    def __init__(self) -> None:
        self.frames: list[Buffer] = []
        self.size = 0
        self.confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def add(self, frame: Buffer) -> None:
        """Add a reply."""
        self.frames.append(frame)
        self.size += len(frame)

    def take(self) -> tuple[list[Buffer], asyncio.Future[None]]:
        """Remove and return all replies, and the future that is done when the broker has confirmed them."""
        taken = self.frames, self.confirmed
        self.frames, self.size = [], 0
        self.confirmed = asyncio.get_running_loop().create_future()
        return taken

    def discard(self) -> None:
        """Remove all replies."""
        self.frames, self.size = [], 0

    def end(self) -> None:
        """Wake the streams that wait for the confirm."""
        if not self.confirmed.done():
            self.confirmed.set_result(None)


class ChunkSender:
    """Send replies to each gateway process in order, with one unconfirmed message at a time.

    Replies that become ready before the confirm are sent together in the next message, so a stream need not
    wait for each confirm. After a reconnect, the unconfirmed message is published again before any later
    message, so the order stays the same.
    """

    def __init__(self, publisher: ReplyPublisher) -> None:
        self._publisher = publisher
        self._waiting: dict[str, GatewayReplies] = {}
        self._gone: set[str] = set()
        self._tasks = TaskSet()

    async def stop(self) -> None:
        """Stop sending, and wake the streams that wait for a confirm."""
        await self._tasks.end()

    async def send_chunks(self, reply_to: str, frames: Sequence[Buffer | Reply], *, left_s: float) -> None:
        """Send replies. Wait for the broker if a reply is large or if too many bytes wait to be sent.

        Otherwise, do not wait. A large reply is sent after the broker has confirmed all earlier replies.
        ``left_s``: for how many seconds the caller still waits. It is used only for large replies.

        Raise GatewayGone if the gateway process has ended.
        """
        for frame in frames:
            self._check(reply_to)
            if isinstance(frame, Reply) or len(frame) > envelope.LARGE:
                await self.confirmed(reply_to)
                self._check(reply_to)
                await self._publisher.send_chunks(reply_to, [frame], left_s=left_s)
                continue
            self._add(reply_to, frame)
            if self._waiting[reply_to].size > MAX_WAITING_BYTES:
                await self.confirmed(reply_to)

    async def reply_last(self, reply_to: str, frame: Buffer) -> None:
        """Send the last reply of a stream. Return when the broker has confirmed it and all earlier ones.

        If replies cannot be sent, the failure is logged and this method returns.
        """
        if reply_to not in self._gone:
            self._add(reply_to, frame)
            await self.confirmed(reply_to)

    async def reply_only(self, reply_to: str, frame: Buffer) -> None:
        """Send the only reply to a request. If the gateway process has ended, the broker drops the reply."""
        await self._publisher.reply(reply_to, [frame])

    def _check(self, reply_to: str) -> None:
        if reply_to in self._gone:
            raise GatewayGone(reply_to)

    def heard_from(self, reply_to: str) -> None:
        """Allow chunks to this gateway process again, because a request from it has arrived."""
        self._gone.discard(reply_to)

    async def confirmed(self, reply_to: str) -> None:
        """Wait until the broker has confirmed all earlier replies to a gateway process.

        If replies cannot be sent, the failure is logged and the wait ends.
        """
        waiting = self._waiting.get(reply_to)
        if waiting is not None:
            # Several streams share the future, so a cancelled stream must not cancel the future.
            await asyncio.shield(waiting.confirmed)

    def _add(self, reply_to: str, frame: Buffer) -> None:
        waiting = self._waiting.get(reply_to)
        if waiting is None:
            waiting = self._waiting[reply_to] = GatewayReplies()
            task = self._tasks.start(self._send(reply_to, waiting), "send chunks")
            # If a task is cancelled before its first step, its ``finally`` does not run. Then only this
            # callback wakes the waiting streams.
            task.add_done_callback(partial(self._end, reply_to, waiting))
        waiting.add(frame)

    async def _send(self, reply_to: str, waiting: GatewayReplies) -> None:
        try:
            while waiting.frames:
                frames, confirmed = waiting.take()
                try:
                    await self._publisher.send_chunks(reply_to, frames)
                except GatewayGone:
                    log.warning(
                        "a gateway process has ended: its streams are cancelled", extra={"queue": reply_to}
                    )
                    self._gone.add(reply_to)
                    waiting.discard()
                except Exception:  # the gateway notices the missing chunks; other streams continue
                    log.exception("chunks were not sent", extra={"queue": reply_to})
                finally:
                    confirmed.set_result(None)
        finally:
            self._end(reply_to, waiting)

    def _end(self, reply_to: str, waiting: GatewayReplies, _: object = None) -> None:
        if self._waiting.get(reply_to) is waiting:
            del self._waiting[reply_to]
        waiting.end()
