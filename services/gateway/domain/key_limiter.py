"""Apply the limits of one caller, with a key or a JWT, in one gateway process.

A request takes one token of each limit from the tokens that this process holds. So it never waits for the
store. In the background, the process reports to the key's account in the store. This report is a settlement.
With it, the process requests the tokens that it needs at its current pace, and returns tokens that it does
not need. Of the rate limit, it requests at least its share of the remaining tokens.

While the key is idle, the process holds no tokens. At the next request, the process may borrow up to its
share of the tokens until the account answers. Then the account is charged for the borrowed tokens. While the
store is down, the process applies its share of each limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.domain.budget import DAY, MONTH, NOTHING, Budget, Reserved, apply
from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, TokenHolding
from services.gateway.domain.leased_tokens import LeasedTokens
from services.gateway.domain.rate_limit_headers import policy, seconds_left
from tidegate.kernel.protocol.access import Allowance

# A process holds the tokens that it needs for this many seconds at its current pace.
AHEAD_S = 0.1
# After this many seconds without a request, a process returns its tokens.
IDLE_S = 1.0
# Seconds between settlements that are not urgent.
REFRESH_S = 0.2
SLOTS_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class LimitReached:
    """The limit that refuses a request.

    ``limit``: one of ``rate``, ``concurrency``, ``day``, ``month``, ``day_budget`` and ``month_budget``.
    ``soon``: True if the account may still have money, so the next settlement may lease it to this process.
    ``retry_after_s``: the seconds until a retry is useful. For limits of a day or a month, this number is
    valid only if ``soon`` is True. Otherwise, the calling code must use ``rate_limit_headers.seconds_left``.
    """

    limit: str
    retry_after_s: float = SLOTS_RETRY_S
    soon: bool = False


class KeyLimiter:
    """The limits of one key in this process.

    The parameter ``now`` of the methods is in seconds, on a monotonic clock.
    """

    __slots__ = (
        "_activate",
        "_last_at",
        "_rate_refused",
        "_requests",
        "_settled_at",
        "_slots_known",
        "_slots_refused",
        "_tight",
        "_tokens",
        "_unsettled",
        "_wait_until",
        "active",
        "allowance",
        "budget",
        "day_quota",
        "in_flight",
        "month_quota",
        "policy",
        "principal",
        "rate",
        "reserved",
        "share",
        "slots",
        "standalone",
    )  # fmt: skip

    def __init__(self, principal: str, allowance: Allowance, activate: Callable[[KeyLimiter], None]) -> None:
        """Start idle. When an idle time ends, the limiter calls ``activate`` with itself.

        ``activate`` must set the limiter's attribute ``share``: this process's share of each limit. The
        attribute ``standalone`` is True while the store is down.
        """
        self.principal = principal
        self.allowance = allowance
        self.share = 1.0
        self.active = False
        self.standalone = False
        self.rate: LeasedTokens | None = None
        self.day_quota: LeasedTokens | None = None
        self.month_quota: LeasedTokens | None = None
        self.budget: Budget | None = None
        self.reserved = NOTHING  # the reservation of the last admitted request
        self._set_allowance(allowance)
        self.in_flight = 0
        self.slots = 0
        self._slots_known = False
        self._slots_refused = 0
        self._tight = False
        self._activate = activate
        self._requests = 0  # the number of requests since the last settlement
        self._unsettled = False  # True from the first request after an idle time until the next settlement
        self._rate_refused = 0
        self._last_at = self._settled_at = self._wait_until = float("-inf")

    def take(self, now: float, nanos: int = 0) -> LimitReached | None:
        """Admit one request, or return the limit that refuses it.

        When an admitted request ends, the calling code must call :meth:`finish`. ``nanos``: the request's
        expected cost in billionths of the currency. This cost is reserved in the budgets.
        """
        if not self.active:
            self._wake(now)
        self._requests += 1
        for tokens in self._tokens:
            if tokens.held < tokens.minimum:
                return self._refuse(tokens, now)
        limit = self.allowance.concurrency
        if limit is not None and self.in_flight >= self._slot_limit(limit):
            self._slots_refused += 1
            return LimitReached("concurrency")
        if self.budget is not None:
            reserved = self.budget.take(nanos)
            if isinstance(reserved, LeasedTokens):
                return LimitReached(reserved.kind, soon=self.budget.short)
            self.reserved = reserved
        for tokens in self._tokens:
            tokens.held -= 1
        self.in_flight += 1
        return None

    def finish(self, reserved: Reserved = NOTHING, nanos: int = 0) -> None:
        """Record the end of an admitted request.

        ``nanos``: its real cost in billionths of the currency. In the budgets, this cost replaces the
        reservation ``reserved``.
        """
        self.in_flight -= 1
        if self.budget is not None:
            self.budget.settle(reserved, nanos)
            if not self.active:  # the account must learn the cost even if no other request follows
                self._wake(self._settled_at)

    def remaining_header(self, epoch_s: float) -> bytes:
        """Return the value of the header ``RateLimit``: what remains of each limit.

        The value is correct as far as this process knows. ``r``: the number of requests that the limit still
        allows. ``t``: the seconds until the full limit is available again.
        """
        found = []
        rate, allowance = self.rate, self.allowance
        # Every response to a key has this header. For speed, do not call min, max or math.ceil.
        if rate is not None and allowance.rate is not None:
            missing = allowance.burst - rate.remaining
            if missing > 0:
                seconds = -(-missing // allowance.rate)
                found.append(b'"rate";r=%d;t=%d' % (allowance.burst - missing, seconds))
            else:
                found.append(b'"rate";r=%d;t=0' % allowance.burst)
        if allowance.concurrency is not None:
            free = allowance.concurrency - self.in_flight
            found.append(b'"concurrency";r=%d' % (free if free > 0 else 0))
        if self.day_quota is not None:
            found.append(b'"day";r=%d;t=%d' % (self.day_quota.remaining, seconds_left("day", epoch_s)))
        if self.month_quota is not None:
            found.append(b'"month";r=%d;t=%d' % (self.month_quota.remaining, seconds_left("month", epoch_s)))
        return b", ".join(found)

    def change(self, allowance: Allowance, now: float) -> None:
        """Set new limits. Spent tokens and requests in flight count towards the new limits too."""
        before, self.allowance = self.allowance, allowance
        self._set_allowance(allowance)
        if before.rate is not None and allowance.rate is not None:
            wait = max(0.0, self._wait_until - now)
            self._wait_until = now + wait * before.rate / allowance.rate
        if before.concurrency != allowance.concurrency:
            self._slots_known = False

    def _set_allowance(self, allowance: Allowance) -> None:
        self.policy = policy(allowance)
        burst = None if allowance.rate is None else allowance.burst
        self.rate = self._with_limit(self.rate, "rate", burst)
        self.day_quota = self._with_limit(self.day_quota, "day", allowance.day)
        self.month_quota = self._with_limit(self.month_quota, "month", allowance.month)
        if allowance.day_budget is allowance.month_budget is None:
            self.budget, self.reserved = None, NOTHING
        else:
            self.budget = self.budget or Budget()
            self.budget.set(allowance, self.share)
        self._tokens = tuple(
            tokens for tokens in (self.rate, self.day_quota, self.month_quota) if tokens is not None
        )

    def _with_limit(self, tokens: LeasedTokens | None, kind: str, limit: int | None) -> LeasedTokens | None:
        """Return ``tokens`` with the new limit. If ``tokens`` is None, create them.

        If ``limit`` is None, return None.
        """
        if limit is None:
            return None
        if tokens is None:
            tokens = LeasedTokens(kind, limit)
            tokens.borrow(self._share_of(limit))
        elif limit != tokens.limit:
            tokens.change(limit)
            minimum = tokens.minimum
            tokens.borrow(self._share_of(tokens.available) if tokens.available >= 1 else 0)
            if kind == "rate" or self.standalone:  # each change of the limit must not allow new borrowing
                tokens.minimum = max(tokens.minimum, minimum)
        return tokens

    def new_day(self, *, new_month: bool) -> None:
        """Begin a new day, and with ``new_month`` also a new month."""
        for tokens, begins in ((self.day_quota, True), (self.month_quota, new_month)):
            if tokens is not None and begins:
                tokens.reset()
                tokens.borrow(self._share_of(tokens.available))
        if self.budget is not None:
            self.budget.new_day(self.share, new_month=new_month)

    def lease_request(self, now: float, day: str) -> LeaseRequest | None:
        """Return the report for the account; None if no report is due now.

        ``day``: today, such as ``2026-01-31``.
        """
        if self._requests:
            self._last_at = now
        if not self._settlement_due(now):
            return None
        idle = now - self._last_at >= IDLE_S
        # The expected number of requests in the next AHEAD_S seconds, at the pace since the last settlement.
        pace = math.ceil(self._requests * AHEAD_S / max(now - self._settled_at, AHEAD_S / 5))
        if self.standalone and self.rate is not None:
            # While the store was down, this process refilled its own tokens, and the account's bucket was
            # refilled too. So report 0 held tokens. Otherwise, the refill would count twice.
            self.rate.borrowed = self.rate.held
        slots = self._slots_wanted(idle)
        self.slots = min(self.slots, slots)  # do not use slots that this settlement returns
        return self._settlement(day, pace, idle, TokenHolding(self.in_flight, slots))

    def release_request(self, day: str) -> LeaseRequest:
        """Return the last report of a process that stops.

        With this report, the process returns all tokens and slots.
        """
        return self._settlement(day, 0, True, TokenHolding())

    def _settlement(self, day: str, pace: int, idle: bool, slots: TokenHolding) -> LeaseRequest:
        return LeaseRequest(
            self.principal,
            self.allowance,
            day,
            day[:7],
            rate=self._holding(self.rate, pace, idle),
            slots=slots,
            day_quota=self._holding(self.day_quota, pace, idle),
            month_quota=self._holding(self.month_quota, pace, idle),
            **self._budget_holdings(pace, idle=idle),
        )

    def _budget_holdings(self, pace: int, *, idle: bool) -> dict[str, TokenHolding]:
        budget = self.budget
        if budget is None:
            return {}
        pairs = ((DAY, budget.day), (MONTH, budget.month))
        return {kind: budget.holding(tokens, pace, idle=idle) for kind, tokens in pairs}

    def apply(self, request: LeaseRequest, grant: LeaseGrant, now: float) -> None:
        """Apply the account's answer to ``request``."""
        limits = request.allowance  # self.allowance may have changed since this request
        if self.rate is not None and limits.rate is not None:
            credit = self._unused_share(request.rate, grant.rate_left) if self._unsettled else 0
            self.rate.apply(request.rate, grant.rate, grant.rate_left, credit)
        # If a process crashes, the tokens that it has leased are lost. So a process leases only a few tokens
        # of a quota, and takes the rest of its share on credit.
        if self.day_quota is not None and limits.day is not None:
            left = max(0, grant.day_left + self.day_quota.limit - limits.day)
            self.day_quota.apply(request.day_quota, grant.day_quota, left, int(left * self.share))
        if self.month_quota is not None and limits.month is not None:
            left = max(0, grant.month_left + self.month_quota.limit - limits.month)
            self.month_quota.apply(request.month_quota, grant.month_quota, left, int(left * self.share))
        if self.budget is not None:
            day, month = self.budget.day, self.budget.month
            left, share = grant.day_budget_left, self.share
            apply(day, request.day_budget, limits.day_budget, grant.day_budget, left, share)
            left = grant.month_budget_left
            apply(month, request.month_budget, limits.month_budget, grant.month_budget, left, share)
        self.slots, self._tight = grant.slots, grant.tight
        self._slots_known = limits.concurrency == self.allowance.concurrency
        self._wait_until = now + grant.wait_ms / 1e3
        self.standalone = self._unsettled = False
        self._end_round(now)

    def use_own_share(self, now: float) -> None:
        """Apply this process's share of each limit, because the store is down."""
        self._fill(now)
        budgets = self.budget.tokens if self.budget is not None else ()
        for tokens in (self.day_quota, self.month_quota, *budgets):
            if tokens is not None:
                more = self._share_of(tokens.available) if tokens.held < 1 <= tokens.available else 0
                tokens.held, tokens.borrowed = tokens.held + more, tokens.borrowed + more
                tokens.available -= more
                tokens.minimum = 1
        if self.allowance.concurrency is not None:
            self.slots = self._share_of(self.allowance.concurrency)
            self._slots_known, self._tight = True, False
        self.standalone, self._unsettled = True, False
        self._end_round(now)

    def _fill(self, now: float) -> None:
        """Refill the rate-limit tokens of a process that applies its own share of the limit.

        The first call after the store failed adds the tokens that the process could still borrow. Each later
        call adds the process's share of the rate for the time since the last call.
        """
        rate = self.rate
        if rate is None or self.allowance.rate is None:
            return
        pace, most = self.allowance.rate * self.share, max(1.0, self.allowance.burst * self.share)
        more = (now - self._settled_at) * pace if self.standalone else 1 - rate.minimum
        rate.held = min(most, max(0.0, rate.held + more))
        rate.minimum, rate.available = 1, 0
        self._wait_until = now + max(0.0, 1 - rate.held) / pace

    def _end_round(self, now: float) -> None:
        self._requests = self._rate_refused = self._slots_refused = 0
        if self.budget is not None:
            self.budget.short = False
        self._settled_at = now
        if now - self._last_at >= IDLE_S and (not self.in_flight or self.allowance.concurrency is None):
            self.active = self._slots_known = False
            if self.budget is not None and not self.standalone and any(t.held for t in self.budget.tokens):
                self._wake(now)  # a request ended during the settlement: report its cost

    def _wake(self, now: float) -> None:
        self._activate(self)  # this must come first, because it sets the share
        if self.standalone:
            self._fill(now)
            self._settled_at = now
        else:
            for tokens in self._tokens:
                # Do not borrow from a bucket or a quota that was empty at the last settlement.
                empty = now < self._wait_until if tokens is self.rate else tokens.available < 1
                tokens.borrow(0 if empty else self._share_of(tokens.available))
            if self.budget is not None:
                self.budget.wake(self.share)
        self.active = True
        self._unsettled = not self.standalone
        self._last_at = now

    def _refuse(self, tokens: LeasedTokens, now: float) -> LimitReached:
        if tokens is not self.rate:
            return LimitReached(tokens.kind)
        self._rate_refused += 1
        return LimitReached(tokens.kind, max(self._wait_until - now, 1 / (self.allowance.rate or 1)))

    def _settlement_due(self, now: float) -> bool:
        since = now - self._settled_at
        if since >= IDLE_S or self._rate_refused or self._slots_refused:
            return True
        if any(
            2 * tokens.held < self._requests and (tokens.available >= 1 or tokens.held < 0)
            for tokens in self._tokens
        ):
            return True
        if self.budget is not None and self.budget.settlement_due(self._requests):
            return True
        spare = self._tight and self.slots > self.in_flight
        return since >= REFRESH_S and (self._requests > 0 or spare)

    def _slot_limit(self, limit: int) -> int:
        return min(limit, self.slots if self._slots_known else max(self.slots, self._share_of(limit)))

    def _share_of(self, tokens: float) -> int:
        """Return this process's share of ``tokens``, at least 1."""
        return max(1, int(tokens * self.share))

    def _holding(self, tokens: LeasedTokens | None, pace: int, idle: bool) -> TokenHolding:
        if tokens is None:
            return TokenHolding()
        if idle or (self._unsettled and tokens is self.rate):
            # An idle process needs no tokens. After an idle time, the remaining tokens of the rate limit are
            # unknown, because other processes may have borrowed too. Then request none until the account has
            # answered.
            return tokens.holding(0)
        share = self._share_of(tokens.available + max(tokens.held, 0)) if tokens is self.rate else 1
        return tokens.holding(max(pace, share))

    def _unused_share(self, reported: TokenHolding, available: float) -> int:
        """Return how many tokens of its share this process may still use.

        The share is computed from the tokens that the account had before this process used any of them.
        """
        used = max(0, -reported.held)
        return max(0, int((available + used) * self.share) - used)

    def _slots_wanted(self, idle: bool) -> int:
        limit = self.allowance.concurrency
        if limit is None or idle:
            return self.in_flight
        needed = self.in_flight + self._slots_refused
        return min(limit, needed if self._tight else max(needed, self._share_of(limit)))
