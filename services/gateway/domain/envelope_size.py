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

    The result is the smallest of these three numbers, but at least 1:

    - the frames that one replica computes in ``QUANTUM_MS``
    - the waiting frames, divided by the number of ready replicas
    - ``limit``

    The result is 1 if no replica is ready, or if the model's time for a request is not measured yet.
    """
    if fleet.request_ms is None or fleet.ready == 0:
        return 1
    by_time = int(QUANTUM_MS / max(fleet.request_ms, 0.001))
    by_share = -(-waiting // fleet.ready)
    return max(1, min(by_time, by_share, limit))


def split(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield the frames of each envelope as a range [start, end) of indexes.

    ``sizes``: the bytes of each frame. An envelope holds at most ``most`` frames and at most ``MAX_BYTES``
    bytes. A frame larger than ``MAX_BYTES`` gets its own envelope.
    """
    return envelope.runs(sizes, most)
