"""The schedule of webhooks, beside the jobs: which are due, who has them in hand, what came of each try.

The transition that ends a job puts its webhook on the schedule, in the same call. Whoever delivers claims
some for a time; two never have the same one at once, and what is not settled in time is due again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from redis.asyncio import Redis

from tidegate.kernel.store.connection import Connected, answer
from tidegate.kernel.store.scripts import Argument, Scripts

DELIVERIES = b"tidegate:job:deliveries:"


class Due(NamedTuple):
    """A webhook in hand: its job, the claim to settle it by, and how many tries there were before."""

    id: bytes
    claim: int
    tries: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a claimed webhook. ``told``: the try, as a document for the log (None: there was none).

    ``again_ms``: it is due again after so long; None: it is over, ``counted`` as delivered or given_up.
    """

    id: bytes
    claim: int
    told: dict[str, Any] | None = None
    again_ms: int | None = None
    counted: str = ""


class WebhookStore(Connected):
    """Typed access to the schedule; every failure is a ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def claim(self, limit: int, lease_ms: int) -> tuple[list[Due], int]:
        """Up to ``limit`` webhooks that are due, claimed for ``lease_ms``; and how many wait in all."""
        waiting, claim, *flat = await self._scripts.run("webhooks_claim", [limit, lease_ms])
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return [Due(id_, claim, tries) for id_, tries in pairs], waiting

    async def settle(self, settled: Sequence[Settled]) -> list[bool]:
        """Say what became of claimed webhooks. False: the claim had ended; nothing is changed but the log."""
        arguments: list[Argument] = []
        for one in settled:
            again = "" if one.again_ms is None else one.again_ms
            told = b"" if one.told is None else orjson.dumps(one.told)
            arguments += (one.id, one.claim, again, told, f"webhooks_{one.counted}" if one.counted else "")
        found: bytes = await self._scripts.run("webhooks_settle", arguments)
        return [one == ord("y") for one in found]

    async def deliveries(self, id: bytes) -> list[dict[str, Any]]:
        """The tries to deliver a job's webhook, oldest first."""
        return [orjson.loads(raw) for raw in await answer(self._redis.lrange(DELIVERIES + id, 0, -1))]
