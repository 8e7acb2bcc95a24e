"""Claim checks: tensors too large for a message go to the blob store, the message carries where they are."""

from __future__ import annotations

import contextlib

from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.claim import read_claim, write_claim
from tidegate.kernel.protocol.envelope import Buffer, Undecodable

# How long a blob outlives its request's deadline: clocks differ, and a late reader gets a clear answer.
MARGIN_S = 60.0


class Claims:
    """Gives and redeems claims; what it raises is :class:`Unavailable`."""

    def __init__(self, blobs: Blobs, above_bytes: int) -> None:
        self._blobs = blobs
        self._above_bytes = above_bytes

    def needed(self, size: int) -> bool:
        """Whether tensors of ``size`` bytes in all are too large for a message."""
        return size > self._above_bytes

    async def give(self, data: list[Buffer], left_s: float, *, durable: bool = False) -> bytes:
        """Keep tensors for ``left_s`` seconds and a margin; gives the claim that stands for them.

        ``durable``: they are on the disk when this returns.
        """
        return write_claim(await self._blobs.put(data, left_s + MARGIN_S, durable=durable), data)

    async def redeem(self, data: list[Buffer]) -> list[Buffer]:
        """The tensors that a frame's claim stands for; they may be redeemed again."""
        try:
            claim = read_claim(data)
        except Undecodable as error:
            raise Unavailable(f"a claim cannot be read: {error}") from None
        return await self._blobs.get_parts(claim.key, claim.sizes)

    async def drop(self, claim: Buffer) -> None:
        """What a claim stands for is not needed any more."""
        with contextlib.suppress(Undecodable, Unavailable):
            await self._blobs.delete(read_claim([claim]).key)

    @staticmethod
    def size(data: list[Buffer]) -> int:
        """The bytes that a frame's claim stands for; 0 when it cannot be read."""
        try:
            return sum(read_claim(data).sizes)
        except Undecodable:
            return 0
