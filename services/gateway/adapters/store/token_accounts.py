"""The accounts of callers' token limits in the live store, shared by all gateway processes.

They count the tokens of language models. The live store may lose the accounts. Then the counts of the minute
and the day start at 0.
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

# The beginning of an account's key in the store; the account's id follows. The value is a hash. It has the
# number of language model tokens in each second, and in the day.
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
        """Charge ``tokens`` to all accounts, or to none if one of them would exceed its limit.

        Return the time of the charge (Unix time in seconds) and the balances before the charge.
        """
        limits = [most or 0 for each in accounts for most in (each.limit.minute, each.limit.day)]
        raw = await answer(
            self._charge(keys=[ACCOUNT + each.id for each in accounts], args=[tokens, *limits])
        )
        found = orjson.loads(raw)
        return int(found["at"]), tuple(TokenBalance(**each) for each in found["balances"])

    async def settle(self, ids: Sequence[str], at: int, difference: int, *, late: bool) -> None:
        """Correct an earlier charge by ``difference`` tokens, in the accounts ``ids``.

        ``at``: the second of the charge (Unix time). If the charge is more than a minute old, the limit per
        minute ignores the correction. But if ``late`` is True, a positive difference counts in the present
        second.
        """
        await answer(self._settle(keys=[ACCOUNT + each for each in ids], args=[at, difference, int(late)]))


@cache
def _source(name: str) -> str:
    return (FOLDER / f"{name}.lua").read_text()
