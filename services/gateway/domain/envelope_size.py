"""Decide how many requests share an envelope.

Requests to light models under load share the broker's cost. Heavy models keep one request per message. Every
ready replica gets its share, and no request waits for an envelope to fill.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.protocol import envelope

QUANTUM_MS = 5.0
MAX_BYTES = envelope.LARGE
MAX_FRAMES = 256


def frames_per_envelope(waiting: int, fleet: ReplicaFleet, limit: int = MAX_FRAMES) -> int:
    """Return the most frames of an envelope, if ``waiting`` leave in this turn of the event loop.

    An envelope holds at most ``QUANTUM_MS`` of one replica's work, at most one ready replica's share of the
    waiting requests, and at most ``limit`` frames. Without a measurement it holds 1.
    """
    if fleet.request_ms is None or fleet.ready == 0:
        return 1
    by_time = int(QUANTUM_MS / max(fleet.request_ms, 0.001))
    by_share = -(-waiting // fleet.ready)
    return max(1, min(by_time, by_share, limit))


def split(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, end) over frames of ``sizes`` bytes: up to ``most`` frames and ``MAX_BYTES`` each.

    A larger frame travels alone.
    """
    return envelope.runs(sizes, most)
