"""The accounts of callers' tokens in the live store, shared by all gateway processes.

The live store may lose the accounts. Then the counts of the minute and the day start at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import orjson
from redis.asyncio import Redis

from services.gateway.domain.llm.token_headers import TokenAccount
from services.gateway.domain.llm.token_window import TokenBalance
from tidegate.kernel.store.connection import Connected, answer
from tidegate.kernel.store.scripts import FOLDER

# The beginning of an account's key in the store; the account's id follows. The value is a hash with the
# tokens of each second and of the day.
ACCOUNT = "tidegate:tokens:"


class TokenAccounts(Connected):
    """Typed access to the accounts. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._charge = redis.register_script(_source("tokens_charge"))
        self._settle = redis.register_script(_source("tokens_settle"))

    async def charge(
        self, accounts: Sequence[TokenAccount], tokens: int
    ) -> tuple[int, tuple[TokenBalance, ...]]:
        """Charge ``tokens`` to all accounts, or to none if one account refuses.

        Return the time of the charge (Unix time in seconds) and the balances before the charge.
        """
        limits = [most or 0 for each in accounts for most in (each.limit.minute, each.limit.day)]
        raw = await answer(
            self._charge(keys=[ACCOUNT + each.id for each in accounts], args=[tokens, *limits])
        )
        found = orjson.loads(raw)
        return int(found["at"]), tuple(TokenBalance(**each) for each in found["balances"])

    async def settle(self, ids: Sequence[str], at: int, difference: int, *, late: bool) -> None:
        """Add ``difference`` to the tokens that were charged to the accounts ``ids`` in the second ``at``.

        If that second is more than a minute ago, the limit per minute ignores the difference. But with
        ``late``, a difference above 0 counts in the present second.
        """
        await answer(self._settle(keys=[ACCOUNT + each for each in ids], args=[at, difference, int(late)]))


@cache
def _source(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text()
