"""What a gateway process and the store tell each other of a caller's limits.

The store has one account for each caller; a process holds a few tokens of it, and so decides alone. It
settles with the store many times a second: what it holds, what it would like to hold. Tokens that it spent
without holding them (it had not heard yet) are negative holdings.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.access import Allowance


@dataclass(frozen=True, slots=True)
class TokenHolding:
    """Tokens of one kind: those that are held (negative: owed), and those that would do."""

    have: int = 0
    want: int = 0


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a process says of one caller. ``day`` is ``2026-01-31``, ``month`` is ``2026-01`` (UTC).

    ``slots``: requests under way, and those that it would like to be able to have.
    """

    principal: str
    allowance: Allowance
    day: str
    month: str
    rate: TokenHolding = TokenHolding()
    slots: TokenHolding = TokenHolding()
    of_day: TokenHolding = TokenHolding()
    of_month: TokenHolding = TokenHolding()


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What the store answers: what may be held from now on, and what is left in the account.

    ``wait_ms``: until the account has a token again. ``tight``: somebody lacks slots.
    ``seeded``: the counts of day and month are known to hold what was used before the store began to count.
    """

    rate: int = 0
    rate_left: float = 0.0
    wait_ms: float = 0.0
    slots: int = 0
    tight: bool = False
    of_day: int = 0
    day_left: int = 0
    of_month: int = 0
    month_left: int = 0
    seeded: bool = True


@dataclass(frozen=True, slots=True)
class PriorUsage:
    """Requests of a caller that were counted elsewhere, on a day and in its month."""

    principal: str
    day: str
    month: str
    of_day: int
    of_month: int
