"""Receive a large body of known size into its final memory, without the HTTP parser and without copies.

Until the body is complete, :class:`InPlaceUpload` is the asyncio protocol of the connection. Then the asyncio
protocol for HTTP takes over again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.gateway.api.body_limits import Body
from tidegate.kernel.errors import TidegateError


class InPlaceUpload(asyncio.BufferedProtocol):
    """An asyncio protocol that receives the rest of one body.

    At the end, it returns the connection to ``owner``, the asyncio protocol for HTTP. Then it calls ``done``:
    with None if the body is complete, or with the error if it is refused.
    """

    def __init__(
        self,
        owner: asyncio.Protocol,
        transport: asyncio.Transport,
        body: Body,
        done: Callable[[TidegateError | None], None],
    ) -> None:
        self._owner = owner
        self._transport = transport
        self._body = body
        self._done = done

    def start(self) -> None:
        """Take over the connection."""
        self._switch(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory for the next bytes."""
        return self._body.window()

    def buffer_updated(self, nbytes: int) -> None:
        """Count ``nbytes`` received bytes; finish if the body is complete or refused."""
        refusal = self._body.took(nbytes)
        if refusal is None and not self._body.complete:
            return
        self.stop()
        self._done(refusal)

    def stop(self) -> None:
        """Return the connection to its owner."""
        if not self._transport.is_closing():
            self._switch(self._owner)

    def _switch(self, protocol: asyncio.BaseProtocol) -> None:
        # asyncio checks only at the start of reading whether a protocol is a BufferedProtocol. So pause
        # reading, set the protocol, and resume reading.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    def eof_received(self) -> bool | None:
        """Pass the event to the owner."""
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the event to the owner."""
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass the event to the owner."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Pass the event to the owner."""
        self._owner.resume_writing()
