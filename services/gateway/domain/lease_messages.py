"""The messages between a gateway process and the store about a caller's limits.

The store has one account for each caller. A process holds a few of the account's tokens, so it can admit
requests without a call to the store. Many times a second, the process reports how many tokens it holds and
wants. The held number is negative if the process has spent more tokens than the account has granted.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.access import Allowance


@dataclass(frozen=True, slots=True)
class TokenHolding:
    """Tokens of one limit. ``held``: how many a process holds; negative if it owes tokens.

    ``wanted``: how many it wants to hold.
    """

    held: int = 0
    wanted: int = 0


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """A process's report about one caller.

    For each limit, the report says how many tokens the process holds and wants. ``day``: today in UTC, such
    as ``2026-01-31``. ``month``: the month of this day, such as ``2026-01``. ``slots`` is for the concurrency
    limit. Its ``held`` is the number of requests in flight. Its ``wanted`` is the highest number of requests
    in flight that the process wants to allow.
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
    """The store's answer to a report.

    For each limit, it contains the tokens that the process gets. The fields that end in ``_left`` are the
    tokens that remain in the account. ``wait_ms``: the time until the account has a token of the rate limit
    again. ``slots``: the number of concurrent requests that the process may allow. ``tight``: True if any
    process had too few of these slots in the last second. ``seeded``: True if the account's counts of the day
    and the month include the requests from before the account existed.
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
    """The number of a caller's requests on a day and in the month of this day.

    The registry has counted these requests.
    """

    principal: str
    day: str
    month: str
    day_requests: int
    month_requests: int
