"""Accounts of what callers may use: one for each, shared by all gateway processes.

Like all live facts they may vanish: then buckets are full again, and counts of days and months are seeded
from what the registry knows of usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import orjson
from redis.asyncio import Redis

from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, PriorUsage, TokenHolding
from tidegate.kernel.store.connection import Connected, answer
from tidegate.kernel.store.scripts import FOLDER

ACCOUNT = "tidegate:limit:"  # + principal: hash of its bucket, its counts, and who holds what; gateways


class LimitAccounts(Connected):
    """Settles with the accounts; every failure is a ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._settle = redis.register_script(_source("limits_settle"))
        self._seed = redis.register_script(_source("limits_seed"))

    async def settle(self, process: str, asks: Sequence[LeaseRequest]) -> list[LeaseGrant]:
        """One call for all: what ``process`` may hold of each caller's account, in the order of ``asks``."""
        if not asks:
            return []
        keys = [ACCOUNT + ask.principal for ask in asks]
        told = await answer(self._settle(keys=keys, args=[process, *map(_ask, asks)]))
        return [LeaseGrant(**orjson.loads(given)) for given in told]

    async def seed(self, used: PriorUsage) -> None:
        """Add what was used before an account began to count; once in a day and a month."""
        args: list[Any] = [used.day, used.of_day, used.month, used.of_month]
        await answer(self._seed(keys=[ACCOUNT + used.principal], args=args))


def _ask(ask: LeaseRequest) -> bytes:
    allowance = ask.allowance

    def pair(holding: TokenHolding) -> list[int]:
        return [holding.have, holding.want]

    fields: dict[str, Any] = {}
    if allowance.rate is not None:
        fields |= {"rate": allowance.rate, "burst": allowance.burst, "of_rate": pair(ask.rate)}
    if allowance.concurrency is not None:
        fields |= {"concurrency": allowance.concurrency, "of_slots": pair(ask.slots)}
    if allowance.day is not None:
        fields |= {"day_limit": allowance.day, "of_day": pair(ask.of_day)}
    if allowance.month is not None:
        fields |= {"month_limit": allowance.month, "of_month": pair(ask.of_month)}
    return orjson.dumps(fields | {"day": ask.day, "month": ask.month})


@cache
def _source(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text()
