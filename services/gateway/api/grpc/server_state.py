"""The state that all gRPC connections of a process share, and their limits.

If there are too many connections, a new connection replaces an idle one. If there are too many calls of
methods that need no credential, the oldest of these calls is ended. If there are too many calls in all, a new
call is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc.call_headers import CallHeaders
from services.gateway.api.grpc.server_call import MethodSpec, ServerCall
from tidegate.kernel.errors import Overloaded, TidegateError
from tidegate.kernel.protocol.access import ANONYMOUS, Principal

# The most calls in flight of a process. CALLS is the limit for all calls. Above CALLS, a new call is refused.
# OPEN_CALLS is the limit for calls that need no credential, except health watches. WATCHES is the limit for
# health watches. Above OPEN_CALLS or WATCHES, the oldest call of that kind is ended.
CALLS = 8192
OPEN_CALLS = 4096
WATCHES = 256


class PeerConnection(Protocol):
    """The part of a connection that this module uses."""

    working: int  # the number of calls in flight that need a credential

    def abort(self) -> None:
        """End the connection immediately."""


class ServerState:
    """The state that all gRPC connections of a gateway process share."""

    def __init__(
        self,
        *,
        methods: dict[str, MethodSpec],
        authenticate: Callable[[dict[bytes, bytes]], Principal],
        limits: BodyLimits,
        refused: Callable[[TidegateError, str], None],
        max_connections: int,
    ) -> None:
        """``refused(error, request_id)`` logs a call that was refused because of its headers."""
        self.methods = methods
        self.authenticate = authenticate
        self.limits = limits
        self.refused = refused
        self.headers_cache: dict[bytes, CallHeaders] = {}
        self.calls = 0
        self._max_connections = max_connections
        self._open_calls: dict[ServerCall, None] = {}
        self._watches: dict[ServerCall, None] = {}
        self._peers: set[PeerConnection] = set()
        # Both dicts hold idle connections, oldest first. An idle connection has no call in flight that needs
        # a credential. The connections in _unknown never had such a call. Those in _idle had at least one.
        self._unknown: dict[PeerConnection, None] = {}
        self._idle: dict[PeerConnection, None] = {}

    def enter(self, peer: PeerConnection) -> bool:
        """Add a connection; return False if the limit is reached and no connection can be replaced.

        At the limit, the new connection replaces the oldest idle one. An idle connection has no call in
        flight that needs a credential. Connections that never had such a call are replaced first.
        """
        if len(self._peers) >= self._max_connections:
            spare = next(iter(self._unknown or self._idle), None)
            if spare is None:
                return False
            spare.abort()
        self._peers.add(peer)
        self._unknown[peer] = None
        return True

    def leave(self, peer: PeerConnection) -> None:
        """Remove a connection that has ended or is about to end."""
        self._peers.discard(peer)
        self._unknown.pop(peer, None)
        self._idle.pop(peer, None)

    def admit(self, call: ServerCall, credential: dict[bytes, bytes]) -> None:
        """Admit a call, or raise Unauthorized, Overloaded or Unavailable.

        ``credential``: the call's headers that can carry a credential.
        """
        if not call.method.open:
            call.principal = self.authenticate(credential)
            call.reader.known = call.principal is not ANONYMOUS
            if not self.limits.answers.room(0):
                raise self.limits.overloaded()
        if self.calls >= CALLS:
            raise Overloaded(
                f"this gateway has {CALLS} calls in flight, which is its limit", retry_after_s=1.0
            )

    def begin(self, peer: PeerConnection, call: ServerCall) -> None:
        """Count an admitted call.

        If there are now too many calls that need no credential, end the oldest of them.
        """
        self.calls += 1
        if call.method.open:
            calls, limit = self._open_calls_like(call)
            calls[call] = None
            if len(calls) > limit:
                _end_oldest(calls)
            return
        if not peer.working:
            self._unknown.pop(peer, None)
            self._idle.pop(peer, None)
        peer.working += 1

    def end(self, peer: PeerConnection, call: ServerCall) -> None:
        """Count a call as ended."""
        self.calls -= 1
        if call.method.open:
            self._open_calls_like(call)[0].pop(call, None)
            return
        peer.working -= 1
        if not peer.working and peer in self._peers:
            self._idle[peer] = None

    def _open_calls_like(self, call: ServerCall) -> tuple[dict[ServerCall, None], int]:
        return (self._watches, WATCHES) if call.method.lasting else (self._open_calls, OPEN_CALLS)


def _end_oldest(calls: dict[ServerCall, None]) -> None:
    """End the oldest call that is a health watch, or whose request has not arrived completely."""
    for call in calls:
        if call.task is None or call.method.lasting:
            call.fail(Overloaded("the call was ended to make room for newer calls without a credential"))
            return
