"""The messages between a gateway process and the store about a caller's limits.

The store has one account for each caller. A process holds a few of the account's tokens, so it can admit
requests without a call to the store. Many times a second, it reports how many tokens it holds and wants. If
it has spent tokens that the account was not charged for yet, the number that it holds is negative.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.access import Allowance


@dataclass(frozen=True, slots=True)
class TokenHolding:
    """Tokens of one limit: the number that a process holds (negative: owes), and the number that it wants."""

    held: int = 0
    wanted: int = 0


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A process's holdings of one caller's limits. ``day`` is ``2026-01-31``, ``month`` is ``2026-01`` (UTC).

    ``slots``: the requests in flight, and how many concurrent requests the process wants to allow.
    """

    principal: str
    allowance: Allowance
    day: str
    month: str
    rate: TokenHolding = TokenHolding()
    slots: TokenHolding = TokenHolding()
    day_quota: TokenHolding = TokenHolding()
    month_quota: TokenHolding = TokenHolding()
    day_budget: TokenHolding = TokenHolding()
    month_budget: TokenHolding = TokenHolding()


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """The store's answer: the tokens that the process holds from now on, and those left in the account.

    ``wait_ms``: the time until the account has a token again. ``tight``: a process had too few slots in the
    last second. ``seeded``: the counts of day and month include the usage from before the account existed.
    """

    rate: int = 0
    rate_left: float = 0.0
    wait_ms: float = 0.0
    slots: int = 0
    tight: bool = False
    day_quota: int = 0
    day_left: int = 0
    month_quota: int = 0
    month_left: int = 0
    day_budget: int = 0
    day_budget_left: int = 0
    month_budget: int = 0
    month_budget_left: int = 0
    seeded: bool = True


@dataclass(frozen=True, slots=True)
class PriorUsage:
    """A caller's requests on a day and in its month, as the registry counted them."""

    principal: str
    day: str
    month: str
    day_requests: int
    month_requests: int
