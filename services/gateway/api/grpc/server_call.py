"""One call on an HTTP/2 connection: what its handler reads, writes, and ends it with."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from google.protobuf.message import DecodeError
from grpc import StatusCode

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc.call_headers import CallHeaders
from services.gateway.api.grpc.message_reader import MessageReader
from services.gateway.api.grpc.status import Metadata, code_of, details_of, percent, trailers_of
from services.gateway.domain.message_weight import FACTOR, structure
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, TidegateError
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.service.app import new_request_id

log = telemetry.logger(__name__)

# A handler that writes waits while more than this is unsent.
UNSENT_BYTES = 256 * 1024
# Messages up to here are not looked at before they are parsed: they cannot become large.
SMALL_MESSAGE = 64 * 1024


class MethodSpec(NamedTuple):
    """``call`` takes a message, or with ``streams`` an iterator of :class:`Received`, and the Call.

    It returns the one response, or None after it has written its responses or ended the call. ``limit``:
    bytes of the largest message. ``open``: needs no credential. ``lasting``: may go on for ever.
    """

    call: Callable[[Any, Any], Awaitable[Any]]
    request: type
    limit: int
    streams: bool = False
    open: bool = False
    lasting: bool = False


class StreamMessage(NamedTuple):
    """A message of a stream, and the bytes that count for it until :meth:`ServerCall.give`."""

    message: Any
    held: int


class CallConnection(Protocol):
    """What a call needs of its connection."""

    def send(self, call: ServerCall) -> None:
        """Send as much of ``call.unsent`` as the windows let through, and the end if there is one."""

    def replenish(self, call: ServerCall) -> None:
        """Let the client send more."""


class ServerCall:
    """The context of a handler. All that it holds of the budget it gives back when it ends."""

    __slots__ = (
        "_given",
        "_limits",
        "_loop",
        "_news",
        "_room",
        "_trailers",
        "_wire",
        "credit",
        "deadline",
        "ending",
        "finished",
        "half_closed",
        "head",
        "headed",
        "id",
        "incoming",
        "method",
        "moved",
        "principal",
        "since",
        "task",
        "unsent",
        "unsent_bytes",
        "window",
    )

    def __init__(
        self,
        wire: CallConnection,
        id_: int,
        head: CallHeaders,
        method: MethodSpec,
        limits: BodyLimits,
        window: int,
    ) -> None:
        self._wire = wire
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._trailers: Metadata = ()
        self._given = 0
        self.id = id_
        self.head = head
        self.method = method
        self.principal: Principal = ANONYMOUS
        self.incoming = MessageReader(limits, method.limit, head.encoding)
        self.half_closed = False
        self.finished = False
        self.headed = False
        self.ending: list[tuple[str, str]] | None = None
        self.unsent: deque[Buffer] = deque()
        self.unsent_bytes = 0
        self.window = window
        self.credit = 0
        self.moved = self.since = self._loop.time()
        self.deadline = None if head.timeout_s is None else self.moved + head.timeout_s
        self.task: asyncio.Task[None] | None = None

    # What the connection says.

    def received(self, data: bytes) -> bool:
        """Take bytes of the client's messages; False: no more are taken. An error in them ends the call."""
        if self.ending is not None or (self.task is not None and not self.method.streams):
            return False
        if not self.incoming.begun:
            self.since = self._loop.time()
        try:
            self.incoming.feed(data)
            if self.incoming.messages:
                self._on_message()
        except TidegateError as error:
            self.fail(error)
        return True

    def ended(self) -> None:
        """The client sends no more."""
        self.half_closed = True
        if self.task is None:
            self.fail(BadRequest("the call ended before its message was complete"))
        elif self.incoming.begun:
            self.fail(BadRequest("the stream ended in the middle of a message"))
        else:
            self._wake()

    def begin(self) -> None:
        """Start the handler of a stream, which reads its messages itself."""
        self.task = self._loop.create_task(self._run(self.requests()))

    def cancel(self) -> None:
        """The client or its connection has gone."""
        self.close()
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Nothing more is sent or taken."""
        self.finished = True
        self.incoming.release()
        self._limits.bodies.give(self._given)
        self._given = 0
        self.sent(self.unsent_bytes)
        self.unsent.clear()
        self._wake()

    def sent(self, count: int) -> None:
        """``count`` bytes of ``unsent`` have left."""
        if count:
            self.unsent_bytes -= count
            self._limits.answers.give(count)
            self.moved = self._loop.time()
        if self._room is not None and self.unsent_bytes <= UNSENT_BYTES:
            if not self._room.done():
                self._room.set_result(None)
            self._room = None

    # What handlers use.

    @property
    def receiving(self) -> bool:
        """Return True if a message is expected that is not whole yet."""
        return self.ending is None and (self.task is None or self.incoming.begun)

    @property
    def rid(self) -> str:
        """The request's id, as the client gave it, or empty."""
        return self.head.rid

    def time_remaining(self) -> float | None:
        """Seconds until the deadline of the client, None without one."""
        return None if self.deadline is None else self.deadline - self._loop.time()

    def set_trailing_metadata(self, trailers: Metadata) -> None:
        """Send these with the response."""
        self._trailers = trailers

    async def requests(self) -> AsyncIterator[StreamMessage]:
        """Yield the messages of a stream; give the bytes of each back by :meth:`give`."""
        while True:
            while self.incoming.messages:
                before = self._given
                message = self._next()
                self._wire.replenish(self)
                yield StreamMessage(message, self._given - before)
            if self.half_closed or self.finished:
                return
            self._news = self._loop.create_future()
            await self._news

    def give(self, held: int) -> None:
        """So many bytes of messages are no longer needed."""
        if not self.finished:
            self._given -= held
            self._limits.bodies.give(held)

    async def write(self, message: Any) -> None:
        """Send a response of a stream; wait while the client does not take what was sent before."""
        if self.finished:
            return
        self._queue(message)
        self._wire.send(self)
        while self.unsent_bytes > UNSENT_BYTES and not self.finished:
            if self._room is None:
                self._room = self._loop.create_future()
            await self._room

    async def abort(self, code: StatusCode, details: str, trailers: Metadata = ()) -> None:
        """End the call with this status. What the handler does after that has no effect."""
        self.end(code, details, trailers)

    def fail(self, error: TidegateError) -> None:
        """End the call with an error, and its handler if that runs."""
        self.end(code_of(error), details_of(error), trailers_of(error, self.rid or new_request_id()))
        if self.task is not None:
            self.task.cancel()

    def end(self, code: StatusCode, details: str, trailers: Metadata = ()) -> None:
        """Say the status; what waits to be sent goes first."""
        if self.finished or self.ending is not None:
            return
        self.ending = [("grpc-status", str(code.value[0]))]
        if details:
            self.ending.append(("grpc-message", percent(details)))
        self.ending += trailers
        self._wire.send(self)

    def _on_message(self) -> None:
        if self.method.streams:
            self._wake()
            return
        self.task = self._loop.create_task(self._run(self._next()))

    def _next(self) -> Any:
        """Return the next message, parsed; raises BadRequest, PayloadTooLarge and Overloaded.

        Its bytes, and what its structure takes, count until they are given back.
        """
        data, held = self.incoming.take()
        self._given += held
        if len(data) > SMALL_MESSAGE:
            size = structure(data)
            self._limits.check_structure(size)
            if not self._limits.bodies.take(size * FACTOR, known=self.incoming.known):
                raise self._limits.overloaded()
            self._given += size * FACTOR
        try:
            return self.method.request.FromString(data)  # type: ignore[attr-defined]
        except DecodeError as error:
            raise BadRequest(f"not a {self.method.request.__name__}: {error}") from None

    async def _run(self, request: Any) -> None:
        try:
            response = await self.method.call(request, self)
            self.give(self._given)
            if self.finished or self.ending is not None:
                return
            if response is not None:
                self._queue(response)
            self.end(StatusCode.OK, "", self._trailers)
        except TidegateError as error:
            self.end(code_of(error), details_of(error), trailers_of(error, self.rid or new_request_id()))
        except asyncio.CancelledError:
            if not self.finished and self.ending is None:
                self.end(StatusCode.CANCELLED, "the server is stopping")
        except Exception:
            log.exception("unexpected error", extra={"request_id": self.rid})
            self.end(StatusCode.INTERNAL, "internal error; see the log of the service")

    def _queue(self, message: Any) -> None:
        data: bytes = message.SerializeToString()
        size = len(data) + 5
        head = struct.pack(">BI", 0, len(data))
        self.unsent.append(head + data if size <= 65_536 else head)
        if size > 65_536:
            self.unsent.append(data)
        self.unsent_bytes += size
        self._limits.answers.force(size)

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
        if self._room is not None and not self._room.done() and self.finished:
            self._room.set_result(None)
            self._room = None
