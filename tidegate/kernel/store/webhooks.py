"""The schedule of webhooks in the store of jobs.

It holds the webhooks that are due or claimed. It also keeps a log of the tries of each webhook.

The call that ends a job in the store also schedules the job's webhook. A dispatcher claims a webhook for a
limited time. In this time, no other dispatcher gets the webhook. If the webhook is not settled before the
time ends, it is due again.
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
    """A webhook that a dispatcher has claimed.

    ``claim``: a number that identifies the claim. :class:`Settled` needs it. ``tries``: the number of earlier
    tries.
    """

    id: bytes
    claim: int
    tries: int


@dataclass(frozen=True, slots=True)
class Settled:
    """The result of a try to deliver a claimed webhook.

    ``logged``: the log entry of the try; None if no try was made. ``again_ms``: milliseconds until the
    webhook is due again; None to remove the webhook from the schedule. ``counted``: when the webhook is
    removed, the counter of this name increases. It is ``delivered`` or ``given_up``; empty for no counter.
    """

    id: bytes
    claim: int
    logged: dict[str, Any] | None = None
    again_ms: int | None = None
    counted: str = ""


class WebhookStore(Connected):
    """Typed access to the schedule of webhooks. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def claim(self, limit: int, lease_ms: int) -> tuple[list[Due], int]:
        """Claim up to ``limit`` due webhooks for ``lease_ms`` milliseconds.

        Return the claimed webhooks, and the number of all scheduled webhooks.
        """
        waiting, claim, *flat = await self._scripts.run("webhooks_claim", [limit, lease_ms])
        pairs = zip(flat[::2], flat[1::2], strict=True)
        return [Due(id_, claim, tries) for id_, tries in pairs], waiting

    async def settle(self, settled: Sequence[Settled]) -> list[bool]:
        """Record the results of webhooks. Return for each webhook whether its claim was still valid.

        If a claim has expired, write only the log entry to the store. Another dispatcher may have claimed
        this webhook since then.
        """
        arguments: list[Argument] = []
        for one in settled:
            again = "" if one.again_ms is None else one.again_ms
            logged = b"" if one.logged is None else orjson.dumps(one.logged)
            arguments += (one.id, one.claim, again, logged, f"webhooks_{one.counted}" if one.counted else "")
        found: bytes = await self._scripts.run("webhooks_settle", arguments)
        return [one == ord("y") for one in found]

    async def deliveries(self, id: bytes) -> list[dict[str, Any]]:
        """Return the log entries of the last 100 tries to deliver a job's webhook, oldest first."""
        return [orjson.loads(raw) for raw in await answer(self._redis.lrange(DELIVERIES + id, 0, -1))]
