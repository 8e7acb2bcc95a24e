"""A large body of a known size, received where it stays: no HTTP parser and no copies in between.

While it comes in, this is the connection's protocol; then the connection is given back to the HTTP one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.gateway.api.body_limits import Body
from tidegate.kernel.errors import TidegateError


class InPlaceUpload(asyncio.BufferedProtocol):
    """The rest of a body, byte by byte as declared. ``done`` is called with None when it is whole, or with
    why it is refused; the connection is the HTTP protocol's again then."""

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
        """Take the connection over."""
        self._switch(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes belong."""
        return self._body.window()

    def buffer_updated(self, nbytes: int) -> None:
        """So many came."""
        refusal = self._body.took(nbytes)
        if refusal is None and not self._body.complete:
            return
        self.stop()
        self._done(refusal)

    def stop(self) -> None:
        """Give the connection back."""
        if not self._transport.is_closing():
            self._switch(self._owner)

    def _switch(self, protocol: asyncio.BaseProtocol) -> None:
        # The two kinds of protocol are read for differently, which is decided when reading begins.
        self._transport.pause_reading()
        self._transport.set_protocol(protocol)
        self._transport.resume_reading()

    def eof_received(self) -> bool | None:
        """The client sends no more: the transport closes."""
        return self._owner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone in the middle of a body."""
        self._owner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The socket's buffer is full."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """The socket's buffer has room."""
        self._owner.resume_writing()
