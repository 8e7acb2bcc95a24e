"""Carry profiles of samples from workers to the router, and bins back to the workers.

A profile counts the values of a column in bins, which are intervals or categories.

tidegate:profile:<deployment>   list of ProfilePiece, from the Deployment's workers to the leading router
tidegate:bins:<deployment>      PublishedBins, written by the router

If the store loses these keys, only the profile pieces of the last seconds are missing. The router writes the
bins again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tidegate.kernel.store.connection import Connected, answer

PROFILE, BINS = "tidegate:profile:", "tidegate:bins:"
# A Deployment's list has at most this many pieces. If no router takes them, the oldest pieces are dropped.
PIECES_KEPT = 100
PIECES_TTL_S = 3600
BINS_TTL_S = 86_400


class ProfileStore(Connected):
    """Typed access to profiles. Every failure raises ``StoreUnavailable``."""

    async def push(self, deployment: str, piece: bytes) -> None:
        """Append a piece of a replica's profile to the Deployment's list."""
        pipe = self._redis.pipeline()
        pipe.rpush(PROFILE + deployment, piece)
        pipe.ltrim(PROFILE + deployment, -PIECES_KEPT, -1)
        pipe.expire(PROFILE + deployment, PIECES_TTL_S)
        await answer(pipe.execute())

    async def take(self, deployments: Sequence[str], count: int = PIECES_KEPT) -> dict[str, list[bytes]]:
        """Remove and return up to ``count`` pieces of each Deployment.

        Leave out Deployments without pieces.
        """
        if not deployments:
            return {}
        pipe = self._redis.pipeline(transaction=False)
        for name in deployments:
            pipe.lpop(PROFILE + name, count)
        found = await answer(pipe.execute())
        return {name: pieces for name, pieces in zip(deployments, found, strict=True) if pieces}

    async def publish_bins(self, bins: Mapping[str, bytes]) -> None:
        """Write the bins of each Deployment."""
        if not bins:
            return
        pipe = self._redis.pipeline(transaction=False)
        for name, raw in bins.items():
            pipe.set(BINS + name, raw, ex=BINS_TTL_S)
        await answer(pipe.execute())

    async def bins(self, deployment: str) -> bytes | None:
        """Return a Deployment's bins; None if it has none."""
        raw: bytes | None = await answer(self._redis.get(BINS + deployment))
        return raw
