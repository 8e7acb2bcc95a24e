"""Decide whether a connection has reached a timeout, from the observations of a sweep. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from tidegate.kernel.settings.base import Settings

# UNREAD_S: seconds for which a client may leave an answer unread. LINGER_S: seconds for which a request is
# still read after an early answer.
UNREAD_S = 60.0
LINGER_S = 2.0
# To make room, a connection with a valid credential may be closed only after it was idle for this many
# seconds.
KEPT_S = 5.0


class HttpLimits(NamedTuple):
    """The limits of one server process. Times in seconds."""

    head_bytes: int = 64 * 1024
    head_fields: int = 100
    header_timeout_s: float = 10.0
    idle_timeout_s: float = 75.0
    body_grace_s: float = 20.0
    body_bytes_per_s: int = 1024
    connections: int = 16_384
    connections_per_peer: int = 8_192
    pending_head_bytes: int = 64 * 2**20

    @classmethod
    def of(cls, settings: Settings) -> HttpLimits:
        """Return the limits of these settings."""
        return cls(
            settings.http_head_bytes,
            settings.http_head_fields,
            settings.http_header_timeout_s,
            settings.http_idle_timeout_s,
            settings.http_body_grace_s,
            settings.http_body_bytes_per_s,
            settings.http_connections,
            settings.http_connections_per_peer,
            settings.http_pending_head_bytes,
        )


class Phase(Enum):
    """The states of a connection."""

    SILENT = "silent"  # no byte of a request yet
    HEAD = "head"
    BODY = "body"
    BUSY = "busy"  # its request is being answered
    UNREAD = "unread"  # the client does not read its answer
    IDLE = "idle"  # between two requests
    CLOSING = "closing"


class TimeoutDecision(Enum):
    """The possible results of a timeout check of a connection."""

    WAIT = "wait"
    RENEW = "renew"  # measure the speed again from now on
    CLOSE = "close"  # close without an answer
    HEADER_TIMEOUT = "header_timeout"
    TOO_SLOW = "body_too_slow"
    ABORT = "abort"


def decide(phase: Phase, waited: float, moved: int, limits: HttpLimits) -> TimeoutDecision:
    """Decide whether to close a connection because of a timeout.

    ``waited``: the seconds since the connection entered ``phase``, or since the last decision RENEW.
    ``moved``: the bytes of a body that the connection received in this time, or the bytes of an answer that
    it sent.
    """
    if phase is Phase.SILENT:
        return TimeoutDecision.CLOSE if waited >= limits.header_timeout_s else TimeoutDecision.WAIT
    if phase is Phase.HEAD:
        return TimeoutDecision.HEADER_TIMEOUT if waited >= limits.header_timeout_s else TimeoutDecision.WAIT
    if phase is Phase.IDLE:
        return TimeoutDecision.CLOSE if waited >= limits.idle_timeout_s else TimeoutDecision.WAIT
    if phase is Phase.CLOSING:
        return TimeoutDecision.ABORT if waited >= LINGER_S else TimeoutDecision.WAIT
    if phase is Phase.BODY and waited >= limits.body_grace_s:
        return TimeoutDecision.TOO_SLOW if moved < waited * limits.body_bytes_per_s else TimeoutDecision.RENEW
    if phase is Phase.UNREAD and waited >= UNREAD_S:
        return TimeoutDecision.ABORT if moved <= 0 else TimeoutDecision.RENEW
    return TimeoutDecision.WAIT


class Standing(NamedTuple):
    """The facts that decide which connections are closed first when there are too many."""

    phase: Phase
    known: bool  # True: its caller has sent a valid credential
    since: float


# A connection whose request is being answered is never closed to make room.
_ORDER = {Phase.CLOSING: 0, Phase.SILENT: 1, Phase.HEAD: 1, Phase.BODY: 2, Phase.IDLE: 3, Phase.UNREAD: 4}


def to_shed(standings: Iterable[Standing], count: int, known_before: float | None = None) -> list[int]:
    """Return the indexes of up to ``count`` connections to close.

    Connections whose callers have sent no valid credential come first. Within each group, ``_ORDER`` ranks
    the phases. Within a phase, the connection that has been in it longest comes first.

    ``known_before``: a connection with a valid credential is included only if it has been idle since this
    time. None: it is never included.
    """
    ranked = sorted(
        (each.known, _ORDER[each.phase], each.since, at)
        for at, each in enumerate(standings)
        if each.phase in _ORDER and (not each.known or _long_idle(each, known_before))
    )
    return [at for *_, at in ranked[:count]]


def _long_idle(standing: Standing, before: float | None) -> bool:
    return before is not None and standing.phase is Phase.IDLE and standing.since <= before


def peer_of(address: str) -> str:
    """Return the peer of an address: the IPv4 address, or the /64 network of an IPv6 address.

    One IPv6 host usually has a whole /64 network.
    """
    if ":" not in address:
        return address
    try:
        found = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(found) >> 64 << 64, 64)))
