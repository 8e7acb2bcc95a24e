"""Check a caller's money budgets in one gateway process, which leases money from the caller's account.

When a request is admitted, its expected cost is reserved. At the end, the real cost replaces the reservation.
So requests in flight count too, and many concurrent requests cannot exceed a budget. Amounts are whole nanos:
a nano is a billionth of the currency.
"""

from __future__ import annotations

from typing import NamedTuple

from services.gateway.domain.lease_messages import TokenHolding
from services.gateway.domain.leased_tokens import LeasedTokens
from tidegate.kernel.protocol.access import Allowance

DAY, MONTH = "day_budget", "month_budget"
# Until the account grants money, a process may spend CREDIT times its share of the remaining budget. CREDIT
# is below 1, because other processes may have spent money since the last settlement.
CREDIT = 0.25


class Reserved(NamedTuple):
    """The amount that one request reserves, and the day and month of the reservation.

    ``day``, ``month``: numbers that this process counts from 0. :meth:`Budget.settle` compares them with the
    present day and month.
    """

    day: int
    month: int
    nanos: int


NOTHING = Reserved(0, 0, 0)


class Budget:
    """The money that this process has leased from one caller's budgets.

    ``day``, ``month``: None if that budget is not set. ``expected``: the expected cost of the last request.
    ``short``: True if a request was refused since the last settlement, although the account may still have
    money.
    """

    __slots__ = ("_days", "_months", "day", "expected", "month", "short")

    def __init__(self) -> None:
        self.day: LeasedTokens | None = None
        self.month: LeasedTokens | None = None
        self.expected = 1
        self.short = False
        self._days = self._months = 0

    @property
    def tokens(self) -> tuple[LeasedTokens, ...]:
        """Return the budgets that are set."""
        return tuple(each for each in (self.day, self.month) if each is not None)

    def set(self, allowance: Allowance, share: float) -> None:
        """Set the limits. Amounts that were spent before still count."""
        self.day = _changed(self.day, DAY, allowance.day_budget, share)
        self.month = _changed(self.month, MONTH, allowance.month_budget, share)

    def take(self, nanos: int) -> Reserved | LeasedTokens:
        """Reserve an amount. Return the reservation, or the budget that refuses it."""
        self.expected = nanos
        budgets = self.tokens
        for each in budgets:
            if each.held - nanos < each.minimum - 1:
                self.short = each.available >= nanos
                return each
        for each in budgets:
            each.held -= nanos
        return Reserved(self._days, self._months, nanos)

    def settle(self, reserved: Reserved, nanos: int) -> None:
        """Replace a reservation by the real cost.

        If the day or month of the reservation has ended, its budget no longer contains the reservation. Then
        only charge the real cost to this budget.
        """
        if self.day is not None:
            self.day.held += (reserved.nanos if reserved.day == self._days else 0) - nanos
        if self.month is not None:
            self.month.held += (reserved.nanos if reserved.month == self._months else 0) - nanos

    def new_day(self, share: float, *, new_month: bool) -> None:
        """Begin a new day, and with ``new_month`` also a new month."""
        self._days += 1
        self._months += new_month
        for tokens, begins in ((self.day, True), (self.month, new_month)):
            if tokens is not None and begins:
                tokens.reset()
                tokens.borrow(_credit(tokens.available, share))

    def wake(self, share: float) -> None:
        """Borrow a part of the remaining budget after an idle time."""
        for each in self.tokens:
            each.borrow(_credit(each.available, share))

    def settlement_due(self, requests: int) -> bool:
        """Return True if this process must settle with the account now.

        It must settle in three cases. First, a request was refused although the account may still have money.
        Second, the process has spent more than a lease. Third, a lease has less than half of the expected
        cost of the next ``requests`` requests, and the account may still have money.
        """
        return self.short or any(
            each.held < 0 or (2 * each.held < requests * self.expected and each.available >= 1)
            for each in self.tokens
        )

    def holding(self, tokens: LeasedTokens | None, requests: int, *, idle: bool) -> TokenHolding:
        """Return the report to the account about one budget.

        The report requests money for the expected cost of the next requests. ``requests``: the number of
        these requests. With ``idle``, the report requests no money.
        """
        if tokens is None:
            return TokenHolding()
        return tokens.holding(0 if idle else max(1, requests) * self.expected)


def apply(
    tokens: LeasedTokens | None,
    reported: TokenHolding,
    limit: int | None,
    granted: int,
    left: int,
    share: float,
) -> None:
    """Apply the account's answer to a report. ``limit``: the budget at the time of the report."""
    if tokens is not None and limit is not None:
        rest = max(0, left + tokens.limit - limit)
        tokens.apply(reported, granted, rest, _credit(rest, share))


def _changed(tokens: LeasedTokens | None, kind: str, limit: int | None, share: float) -> LeasedTokens | None:
    if limit is None:
        return None
    if tokens is None:
        tokens = LeasedTokens(kind, limit)
        tokens.borrow(_credit(limit, share))
    elif limit != tokens.limit:
        tokens.change(limit)
        tokens.borrow(_credit(tokens.available, share))
    return tokens


def _credit(available: float, share: float) -> int:
    return int(available * share * CREDIT)
