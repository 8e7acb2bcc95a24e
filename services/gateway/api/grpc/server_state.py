"""What all gRPC connections of the process have in common, and which of them give way to new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc.call_headers import CallHeaders
from services.gateway.api.grpc.server_call import MethodSpec, ServerCall
from tidegate.kernel.errors import Overloaded, TidegateError
from tidegate.kernel.protocol.access import ANONYMOUS, Principal

# Calls of the process. Of these such that need no credential, and of these such that may go on for ever: the
# oldest makes room for a new one.
CALLS = 8192
OPEN_CALLS = 4096
WATCHES = 256


class PeerConnection(Protocol):
    """A connection, as far as this module knows it."""

    working: int

    def abort(self) -> None:
        """End it without a word."""


class ServerState:
    """One for each gateway process."""

    def __init__(
        self,
        *,
        methods: dict[str, MethodSpec],
        authenticate: Callable[[dict[bytes, bytes]], Principal],
        limits: BodyLimits,
        refused: Callable[[TidegateError, str], None],
        max_connections: int,
    ) -> None:
        """``refused`` counts and logs a call that is refused by its head: why, and its id."""
        self.methods = methods
        self.authenticate = authenticate
        self.limits = limits
        self.refused = refused
        self.heads: dict[bytes, CallHeaders] = {}
        self.calls = 0
        self._max_connections = max_connections
        self._open_calls: dict[ServerCall, None] = {}
        self._watches: dict[ServerCall, None] = {}
        self._peers: set[PeerConnection] = set()
        # Those without a call of a known caller, the oldest first: such that never had one, and the others.
        self._strangers: dict[PeerConnection, None] = {}
        self._resting: dict[PeerConnection, None] = {}

    def enter(self, peer: PeerConnection) -> bool:
        """Take a connection in, in place of one that does nothing for a known caller if need be."""
        if len(self._peers) >= self._max_connections:
            spare = next(iter(self._strangers or self._resting), None)
            if spare is None:
                return False
            spare.abort()
        self._peers.add(peer)
        self._strangers[peer] = None
        return True

    def leave(self, peer: PeerConnection) -> None:
        """The connection has ended, or is about to."""
        self._peers.discard(peer)
        self._strangers.pop(peer, None)
        self._resting.pop(peer, None)

    def admit(self, call: ServerCall, credential: dict[bytes, bytes]) -> None:
        """Let a call in by its head; raises Unauthorized, Overloaded, Unavailable."""
        if not call.method.open:
            call.principal = self.authenticate(credential)
            call.incoming.known = call.principal is not ANONYMOUS
            if not self.limits.answers.room(0):
                raise self.limits.overloaded()
        if self.calls >= CALLS:
            raise Overloaded("this gateway has reached its limit of calls", retry_after_s=1.0)

    def begin(self, peer: PeerConnection, call: ServerCall) -> None:
        """Count a call that was let in."""
        self.calls += 1
        if call.method.open:
            calls, most = self._among(call)
            calls[call] = None
            if len(calls) > most:
                _end_oldest(calls)
            return
        if not peer.working:
            self._strangers.pop(peer, None)
            self._resting.pop(peer, None)
        peer.working += 1

    def end(self, peer: PeerConnection, call: ServerCall) -> None:
        """The call is over."""
        self.calls -= 1
        if call.method.open:
            self._among(call)[0].pop(call, None)
            return
        peer.working -= 1
        if not peer.working and peer in self._peers:
            self._resting[peer] = None

    def _among(self, call: ServerCall) -> tuple[dict[ServerCall, None], int]:
        return (self._watches, WATCHES) if call.method.lasting else (self._open_calls, OPEN_CALLS)


def _end_oldest(calls: dict[ServerCall, None]) -> None:
    """End the oldest of these calls, but none that is about to be answered."""
    for call in calls:
        if call.task is None or call.method.lasting:
            call.fail(Overloaded("closed to make room for newer calls without a credential"))
            return
