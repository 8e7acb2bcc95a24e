"""How many requests share an envelope.

Light models under load share the broker's cost; heavy ones keep one request per message; every ready
replica gets its part; nothing waits for an envelope to fill.
"""

from __future__ import annotations

from collections.abc import Iterator

from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.protocol import envelope

QUANTUM_MS = 5.0
MAX_BYTES = envelope.LARGE
MAX_FRAMES = 256


def frames_per_envelope(waiting: int, fleet: ReplicaFleet, limit: int = MAX_FRAMES) -> int:
    """The most frames an envelope may carry when ``waiting`` go out in this turn of the event loop.

    No envelope holds more than ``QUANTUM_MS`` of one replica's work, and none so many that a ready
    replica goes without, and never more than ``limit``. Nothing measured yet: 1.
    """
    if fleet.request_ms is None or fleet.ready == 0:
        return 1
    by_time = int(QUANTUM_MS / max(fleet.request_ms, 0.001))
    by_share = -(-waiting // fleet.ready)
    return max(1, min(by_time, by_share, limit))


def split(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) over frames of ``sizes`` bytes: up to ``most`` frames and ``MAX_BYTES`` each.

    A frame larger than that travels alone.
    """
    return envelope.runs(sizes, most)
