"""The accounts of callers' limits in the live store, one for each caller. All gateways share them.

The live store may lose the accounts. Then the token buckets are full again, and the counts of day and month
start with the usage that the registry has counted.
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

# The beginning of an account's key in the store; the principal's id follows. The value is a hash with the
# token bucket, the counts of day and month, and what each process has leased.
ACCOUNT = "tidegate:limit:"


class LimitAccounts(Connected):
    """Typed access to the accounts. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._settle = redis.register_script(_source("limits_settle"))
        self._seed = redis.register_script(_source("limits_seed"))

    async def settle(self, process: str, requests: Sequence[LeaseRequest]) -> list[LeaseGrant]:
        """Settle a process's lease requests in one call. Return one grant for each, in the same order."""
        if not requests:
            return []
        keys = [ACCOUNT + request.principal for request in requests]
        grants = await answer(self._settle(keys=keys, args=[process, *map(_encoded, requests)]))
        return [_grant(orjson.loads(grant)) for grant in grants]

    async def seed(self, usage: PriorUsage) -> None:
        """Add to an account the requests that the registry had counted before the account existed.

        A repeated call for the same day or month has no effect.
        """
        args: list[Any] = [usage.day, usage.day_requests, usage.month, usage.month_requests]
        await answer(self._seed(keys=[ACCOUNT + usage.principal], args=args))


def _grant(values: dict[str, Any]) -> LeaseGrant:
    # Lua writes a large whole number as 1e+14, which JSON decodes as a float. So convert it back.
    whole = {name: int(value) for name, value in values.items() if "_budget" in name}
    return LeaseGrant(**(values | whole))


def _encoded(request: LeaseRequest) -> bytes:
    allowance = request.allowance

    def pair(holding: TokenHolding) -> list[int]:
        return [holding.held, holding.wanted]

    fields: dict[str, Any] = {}
    if allowance.rate is not None:
        fields |= {"rate": allowance.rate, "burst": allowance.burst, "tokens": pair(request.rate)}
    if allowance.concurrency is not None:
        fields |= {"concurrency": allowance.concurrency, "slots": pair(request.slots)}
    if allowance.day is not None:
        fields |= {"day_limit": allowance.day, "day_quota": pair(request.day_quota)}
    if allowance.month is not None:
        fields |= {"month_limit": allowance.month, "month_quota": pair(request.month_quota)}
    if allowance.day_budget is not None:
        fields |= {"day_budget_limit": allowance.day_budget, "day_budget": pair(request.day_budget)}
    if allowance.month_budget is not None:
        fields |= {"month_budget_limit": allowance.month_budget, "month_budget": pair(request.month_budget)}
    return orjson.dumps(fields | {"day": request.day, "month": request.month})


@cache
def _source(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text()
