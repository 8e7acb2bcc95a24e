"""Decide how many requests share an envelope.

Under load, requests to a fast model share an envelope, because the broker handles one large message faster
than many small ones. Each request to a slow model gets its own envelope. The size of an envelope is limited,
so that every ready replica gets some of the waiting requests. Requests never wait until an envelope is full.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.protocol import envelope

QUANTUM_MS = 5.0
MAX_BYTES = envelope.LARGE
MAX_FRAMES = 256


def frames_per_envelope(waiting: int, fleet: ReplicaFleet, limit: int = MAX_FRAMES) -> int:
    """Return how many frames an envelope may hold, if ``waiting`` frames are published now.

    An envelope holds at most ``QUANTUM_MS`` of one replica's work, at most the waiting frames divided by the
    ready replicas, and at most ``limit`` frames. It holds 1 frame if no replica is ready or no model time is
    measured.
    """
    if fleet.request_ms is None or fleet.ready == 0:
        return 1
    by_time = int(QUANTUM_MS / max(fleet.request_ms, 0.001))
    by_share = -(-waiting // fleet.ready)
    return max(1, min(by_time, by_share, limit))


def split(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the range [start, end) of frames for each envelope: up to ``most`` frames, ``MAX_BYTES`` bytes.

    ``sizes``: the bytes of each frame. A frame larger than ``MAX_BYTES`` gets its own envelope.
    """
    return envelope.runs(sizes, most)
