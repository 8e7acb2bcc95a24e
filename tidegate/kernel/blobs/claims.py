"""Store tensors that are too large for a message, and send a claim (a reference) in their place."""

from __future__ import annotations

import contextlib

from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.claim import read_claim, write_claim
from tidegate.kernel.protocol.envelope import Buffer, Undecodable

# Seconds that a blob is kept after its request's deadline, because clocks differ and readers can be late.
MARGIN_S = 60.0


class Claims:
    """Access to tensors in the blob store by their claims.

    :meth:`give` and :meth:`redeem` raise :class:`Unavailable` if they fail.
    """

    def __init__(self, blobs: Blobs, above_bytes: int) -> None:
        self._blobs = blobs
        self._above_bytes = above_bytes

    def needed(self, size: int) -> bool:
        """Return True if tensors of ``size`` bytes in all are too large for a message."""
        return size > self._above_bytes

    async def give(self, data: list[Buffer], left_s: float, *, durable: bool = False) -> bytes:
        """Store tensors for ``left_s`` seconds and a margin. Return the claim of the tensors.

        With ``durable``, the tensors are on disk when this returns.
        """
        return write_claim(await self._blobs.put(data, left_s + MARGIN_S, durable=durable), data)

    async def redeem(self, data: list[Buffer]) -> list[Buffer]:
        """Return the tensors of a frame's claim. The tensors stay in the store, and can be read again."""
        try:
            claim = read_claim(data)
        except Undecodable as error:
            raise Unavailable(f"a claim cannot be read: {error}") from None
        return await self._blobs.get_parts(claim.key, claim.sizes)

    async def drop(self, claim: Buffer) -> None:
        """Delete the tensors of a claim."""
        with contextlib.suppress(Undecodable, Unavailable):
            await self._blobs.delete(read_claim([claim]).key)

    @staticmethod
    def size(data: list[Buffer]) -> int:
        """Return the size in bytes of the tensors behind a frame's claim; 0 if the claim cannot be read."""
        try:
            return sum(read_claim(data).sizes)
        except Undecodable:
            return 0
