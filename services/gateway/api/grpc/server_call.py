"""One gRPC call on an HTTP/2 connection: its messages, its responses and its status."""

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
from tidegate.kernel.http.answers import new_request_id
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.envelope import Buffer

log = telemetry.logger(__name__)

# A handler that writes must wait while more bytes than this are unsent.
UNSENT_BYTES = 256 * 1024
# A message with at most this many bytes is parsed without a check of its structure. The parsed structure of
# such a message cannot take much memory.
SMALL_MESSAGE = 64 * 1024


Address = tuple[str, int]


class MethodSpec(NamedTuple):
    """A method of a service, and its limits.

    ``call``: the handler of a call. Its arguments are the message and the ServerCall. With ``streams``, it
    gets an iterator of :class:`StreamMessage` in place of the message. ``call`` returns the response, or None
    if it has already written its responses or ended the call. ``limit``: the most bytes of a message.
    ``open``: True if the method needs no credential. ``lasting``: True if a call runs until its client ends
    it.
    """

    call: Callable[[Any, Any], Awaitable[Any]]
    request: type
    limit: int
    streams: bool = False
    open: bool = False
    lasting: bool = False


class StreamMessage(NamedTuple):
    """A message of a stream.

    ``held``: the bytes that the memory budget counts until :meth:`ServerCall.release`.
    """

    message: Any
    held: int


class CallConnection(Protocol):
    """The part of a connection that a call uses."""

    def send(self, call: ServerCall) -> None:
        """Send as much of ``call.unsent`` as flow control allows, and the status at the end of the call."""

    def replenish(self, call: ServerCall) -> None:
        """Allow the client to send more bytes."""

    def addresses(self) -> tuple[Address | None, Address | None]:
        """Return host and port of the client and of the server, if they are known."""


class ServerCall:
    """A gRPC call. Its handler gets this object as the context.

    When the call ends, all its bytes are returned to the memory budget.
    """

    __slots__ = (
        "_connection",
        "_held",
        "_limits",
        "_loop",
        "_message_waiter",
        "_trailers",
        "_write_waiter",
        "deadline",
        "final_trailers",
        "finished",
        "half_closed",
        "headers",
        "headers_sent",
        "id",
        "message_began_at",
        "method",
        "principal",
        "reader",
        "receive_window",
        "send_window",
        "sent_at",
        "task",
        "unsent",
        "unsent_bytes",
    )

    def __init__(
        self,
        connection: CallConnection,
        id_: int,
        headers: CallHeaders,
        method: MethodSpec,
        limits: BodyLimits,
        send_window: int,
    ) -> None:
        self._connection = connection
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._message_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None
        self._trailers: Metadata = ()
        self._held = 0
        self.id = id_
        self.headers = headers
        self.method = method
        self.principal: Principal = ANONYMOUS
        self.reader = MessageReader(limits, method.limit, headers.encoding)
        self.half_closed = False
        self.finished = False
        self.headers_sent = False
        self.final_trailers: list[tuple[str, str]] | None = None
        self.unsent: deque[Buffer] = deque()
        self.unsent_bytes = 0
        self.send_window = send_window
        self.receive_window = 0
        self.sent_at = self.message_began_at = self._loop.time()
        self.deadline = None if headers.timeout_s is None else self.sent_at + headers.timeout_s
        self.task: asyncio.Task[None] | None = None

    def addresses(self) -> tuple[Address | None, Address | None]:
        """Return host and port of the client and of the server, if they are known."""
        return self._connection.addresses()

    # Events from the connection.

    def received(self, data: bytes) -> bool:
        """Read bytes of messages. Return False if the call reads no more. Invalid bytes end the call."""
        if self.final_trailers is not None or (self.task is not None and not self.method.streams):
            return False
        if not self.reader.begun:
            self.message_began_at = self._loop.time()
        try:
            self.reader.feed(data)
            if self.reader.messages:
                self._on_message()
        except TidegateError as error:
            self.fail(error)
        return True

    def ended(self) -> None:
        """Record that the client has sent its last message."""
        self.half_closed = True
        if self.task is None:
            self.fail(BadRequest("the call ended before its message was complete"))
        elif self.reader.begun:
            self.fail(BadRequest("the stream ended in the middle of a message"))
        else:
            self._wake()

    def begin(self) -> None:
        """Start the handler of a stream, which reads the messages itself."""
        self.task = self._loop.create_task(self._run(self.requests()))

    def cancel(self) -> None:
        """Cancel the call, because its client cancelled it or disconnected."""
        self.close()
        if self.task is not None:
            self.task.cancel()

    def close(self) -> None:
        """Free the call's memory. Nothing more is sent or received."""
        self.finished = True
        self.reader.release()
        self._limits.bodies.release(self._held)
        self._held = 0
        self.sent(self.unsent_bytes)
        self.unsent.clear()
        self._wake()

    def sent(self, count: int) -> None:
        """Count ``count`` bytes of ``unsent`` as sent."""
        if count:
            self.unsent_bytes -= count
            self._limits.answers.release(count)
            self.sent_at = self._loop.time()
        if self._write_waiter is not None and self.unsent_bytes <= UNSENT_BYTES:
            if not self._write_waiter.done():
                self._write_waiter.set_result(None)
            self._write_waiter = None

    # Methods for handlers.

    @property
    def receiving(self) -> bool:
        """Return True if the call waits for its only message, or for the rest of a message."""
        return self.final_trailers is None and (self.task is None or self.reader.begun)

    @property
    def rid(self) -> str:
        """Return the request id that the client sent, or an empty string."""
        return self.headers.rid

    def time_remaining(self) -> float | None:
        """Return the seconds until the client's deadline, or None if the client set no deadline."""
        return None if self.deadline is None else self.deadline - self._loop.time()

    def set_trailing_metadata(self, trailers: Metadata) -> None:
        """Set trailers to send with the response."""
        self._trailers = trailers

    async def requests(self) -> AsyncIterator[StreamMessage]:
        """Yield the messages of a stream. The handler must :meth:`release` the bytes of each."""
        while True:
            while self.reader.messages:
                before = self._held
                message = self._next()
                self._connection.replenish(self)
                yield StreamMessage(message, self._held - before)
            if self.half_closed or self.finished:
                return
            self._message_waiter = self._loop.create_future()
            await self._message_waiter

    def release(self, held: int) -> None:
        """Return ``held`` bytes of messages to the memory budget."""
        if not self.finished:
            self._held -= held
            self._limits.bodies.release(held)

    async def write(self, message: Any) -> None:
        """Send a response of a stream.

        If more than ``UNSENT_BYTES`` bytes are unsent after that, wait until the client reads.
        """
        if self.finished:
            return
        self._queue(message)
        self._connection.send(self)
        while self.unsent_bytes > UNSENT_BYTES and not self.finished:
            if self._write_waiter is None:
                self._write_waiter = self._loop.create_future()
            await self._write_waiter

    async def abort(self, code: StatusCode, details: str, trailers: Metadata = ()) -> None:
        """End the call with this status. Nothing that the handler sends later has an effect."""
        self.end(code, details, trailers)

    def fail(self, error: TidegateError) -> None:
        """End the call with an error, and cancel its handler."""
        self.end(code_of(error), details_of(error), trailers_of(error, self.rid or new_request_id()))
        if self.task is not None:
            self.task.cancel()

    def end(self, code: StatusCode, details: str, trailers: Metadata = ()) -> None:
        """Send the status after all unsent responses."""
        if self.finished or self.final_trailers is not None:
            return
        self.final_trailers = [("grpc-status", str(code.value[0]))]
        if details:
            self.final_trailers.append(("grpc-message", percent(details)))
        self.final_trailers += trailers
        self._connection.send(self)

    def _on_message(self) -> None:
        if self.method.streams:
            self._wake()
            return
        self.task = self._loop.create_task(self._run(self._next()))

    def _next(self) -> Any:
        """Return the next message, parsed; raise BadRequest, PayloadTooLarge or Overloaded.

        The memory budget counts the message's bytes and its parsed structure until the handler releases them.
        """
        data, held = self.reader.take()
        self._held += held
        if len(data) > SMALL_MESSAGE:
            size = structure(data)
            self._limits.check_structure(size)
            if not self._limits.bodies.take(size * FACTOR, known=self.reader.known):
                raise self._limits.overloaded()
            self._held += size * FACTOR
        try:
            return self.method.request.FromString(data)  # type: ignore[attr-defined]
        except DecodeError as error:
            raise BadRequest(f"not a {self.method.request.__name__}: {error}") from None

    async def _run(self, request: Any) -> None:
        try:
            response = await self.method.call(request, self)
            self.release(self._held)
            if self.finished or self.final_trailers is not None:
                return
            if response is not None:
                self._queue(response)
            self.end(StatusCode.OK, "", self._trailers)
        except TidegateError as error:
            self.end(code_of(error), details_of(error), trailers_of(error, self.rid or new_request_id()))
        except asyncio.CancelledError:
            if not self.finished and self.final_trailers is None:
                self.end(StatusCode.CANCELLED, "the server is stopping")
        except Exception:
            log.exception("unexpected error", extra={"request_id": self.rid})
            self.end(StatusCode.INTERNAL, "internal error; see the log of the service")

    def _queue(self, message: Any) -> None:
        data: bytes = message.SerializeToString()
        size = len(data) + 5
        prefix = struct.pack(">BI", 0, len(data))
        self.unsent.append(prefix + data if size <= 65_536 else prefix)
        if size > 65_536:
            self.unsent.append(data)
        self.unsent_bytes += size
        self._limits.answers.force(size)

    def _wake(self) -> None:
        if self._message_waiter is not None and not self._message_waiter.done():
            self._message_waiter.set_result(None)
        if self._write_waiter is not None and not self._write_waiter.done() and self.finished:
            self._write_waiter.set_result(None)
            self._write_waiter = None
