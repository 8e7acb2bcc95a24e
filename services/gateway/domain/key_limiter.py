"""A caller's limits as one gateway process sees them: tokens that it holds of the caller's account.

A request takes its tokens from here, and never waits. Between requests the process settles with the account
in the store: it asks for what its own pace will need and for its share of what is left, and gives back what
it does not use. Where it holds nothing because nobody has called for a while, it lends its share until it has
heard; the account is charged for what was lent. While the store is away it goes by its share of each limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.domain.lease_messages import LeaseGrant, LeaseRequest, TokenHolding
from services.gateway.domain.rate_limit_headers import policy
from tidegate.kernel.protocol.access import Allowance

# How far ahead of its pace a process holds tokens, and how long it holds them for nobody.
AHEAD_S = 0.1
IDLE_S = 1.0
# A settlement that nothing forces.
REFRESH_S = 0.2
SLOTS_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class LimitReached:
    """Which limit is used up: ``rate``, ``day``, ``month`` or ``concurrency``. When a day
    or a month is over, ``ratelimit.seconds_left`` knows.
    """

    limit: str
    retry_after_s: float = SLOTS_RETRY_S


class LeasedTokens:
    """Those of one kind. ``least``: so many must be there for one to be taken; below 1 there is credit."""

    __slots__ = ("cut", "have", "kind", "least", "left", "lent", "limit")

    def __init__(self, kind: str, limit: int) -> None:
        self.kind = kind
        self.limit = limit
        self.have: float = 0
        self.least: float = 1
        self.left: float = limit  # in the account, when last heard of
        self.lent: float = 0  # of those held, what the account does not know of
        # Of those that the account was told of and has not answered for, what went by a change.
        self.cut: float = 0

    @property
    def remaining(self) -> int:
        """What this process can tell of what is left."""
        found = int(self.left + self.have)
        return found if found > 0 else 0

    def lend(self, share: int) -> None:
        """Until the account is heard of, so many may be taken."""
        self.least = 1 - share

    def holding(self, want: int) -> TokenHolding:
        """What to tell the account."""
        self.cut = 0
        return TokenHolding(math.floor(self.have - self.lent), min(want, self.limit))

    def settled(self, asked: TokenHolding, given: int, left: float, credit: int = 0) -> None:
        """The account has answered; what was taken in the meantime stays taken."""
        have = math.floor(self.have - self.lent + self.cut) - asked.have + given
        # What was given under a limit that is lower since counts up to that.
        self.have, self.left = min(have, self.limit), min(left, self.limit)
        self.lent = self.cut = 0
        self.least = 1 - min(credit, self.limit)

    def change(self, limit: int) -> None:
        """Another limit: what was spent of the old one is spent, and no more is left than the new one."""
        rest = self.left + self.have
        if self.kind != "rate" or self.left >= self.limit:
            rest += limit - self.limit  # a bucket that was not full has to fill up to its new size
        rest, held, known = min(rest, limit), self.have, self.have - self.lent
        self.have = min(held, max(0, rest))
        self.lent = max(0, self.lent - (held - self.have))
        self.cut += known - (self.have - self.lent)
        self.left = min(limit, max(0, rest - self.have))
        self.limit = limit

    def begin(self) -> None:
        """A new period: tokens of the old one are worth nothing."""
        self.have = self.lent = self.cut = 0
        self.left = self.limit


class KeyLimiter:
    """All limits of one caller. ``now`` is in seconds, on a clock that never goes back."""

    __slots__ = (
        "_activate", "_asked", "_fresh", "_heard_at", "_last_at", "_rate_denied", "_slots_denied",
        "_slots_heard", "_tight", "_tokens", "_wait_until", "active", "allowance", "local", "of_day",
        "of_month", "policy", "principal", "rate", "share", "slots", "under_way",
    )  # fmt: skip

    def __init__(self, principal: str, allowance: Allowance, activate: Callable[[KeyLimiter], None]) -> None:
        """``activate`` is called when the meter has something to settle, once until it is idle again."""
        self.principal = principal
        self.allowance = allowance
        self.share = 1.0  # of one process in each limit
        self.active = False
        self.local = False
        self.rate: LeasedTokens | None = None
        self.of_day: LeasedTokens | None = None
        self.of_month: LeasedTokens | None = None
        self._bound(allowance)
        self.under_way = 0
        self.slots = 0
        self._slots_heard = False
        self._slots_denied = 0
        self._tight = False
        self._activate = activate
        self._asked = 0  # requests since the last settlement
        self._fresh = False  # nothing was settled since it woke
        self._rate_denied = 0
        self._last_at = self._heard_at = self._wait_until = float("-inf")

    def take(self, now: float) -> LimitReached | None:
        """Let one request in, or say why not. Who was let in calls :meth:`give` at its end."""
        if not self.active:
            self._wake(now)
        self._asked += 1
        for kind in self._tokens:
            if kind.have < kind.least:
                return self._denied(kind, now)
        limit = self.allowance.concurrency
        if limit is not None and self.under_way >= self._room(limit):
            self._slots_denied += 1
            return LimitReached("concurrency")
        for kind in self._tokens:
            kind.have -= 1
        self.under_way += 1
        return None

    def give(self) -> None:
        """A request is over."""
        self.under_way -= 1

    def change(self, allowance: Allowance, now: float) -> None:
        """Other limits from now on; what was spent and what is under way counts for them too."""
        before, self.allowance = self.allowance, allowance
        self._bound(allowance)
        if before.rate is not None and allowance.rate is not None:
            wait = max(0.0, self._wait_until - now)
            self._wait_until = now + wait * before.rate / allowance.rate
        if before.concurrency != allowance.concurrency:
            self._slots_heard = False

    def _bound(self, to: Allowance) -> None:
        self.policy = policy(to)
        self.rate = self._kind(self.rate, "rate", None if to.rate is None else to.burst)
        self.of_day = self._kind(self.of_day, "day", to.day)
        self.of_month = self._kind(self.of_month, "month", to.month)
        self._tokens = tuple(kind for kind in (self.rate, self.of_day, self.of_month) if kind is not None)

    def _kind(self, tokens: LeasedTokens | None, kind: str, limit: int | None) -> LeasedTokens | None:
        """Those of one kind, under a limit that is new to them."""
        if limit is None:
            return None
        if tokens is None:
            tokens = LeasedTokens(kind, limit)
            tokens.lend(self._part(limit))
        elif limit != tokens.limit:
            tokens.change(limit)
            least = tokens.least
            tokens.lend(self._part(tokens.left) if tokens.left >= 1 else 0)
            if kind == "rate" or self.local:  # of these no more is lent than was before
                tokens.least = max(tokens.least, least)
        return tokens

    def new_day(self, *, new_month: bool) -> None:
        """The day is over."""
        for kind, begins in ((self.of_day, True), (self.of_month, new_month)):
            if kind is not None and begins:
                kind.begin()
                kind.lend(self._part(kind.left))

    def ask(self, now: float, day: str) -> LeaseRequest | None:
        """What to settle now, on ``day`` (``2026-01-31``); None: nothing, for the moment."""
        if self._asked:
            self._last_at = now
        if not self._due(now):
            return None
        idle = now - self._last_at >= IDLE_S
        # How many requests come in AHEAD_S, by those since the last settlement.
        pace = math.ceil(self._asked * AHEAD_S / max(now - self._heard_at, AHEAD_S / 5))
        if self.local and self.rate is not None:
            self.rate.lent = self.rate.have  # the account went on filling by itself
        slots = self._slots_wanted(idle)
        self.slots = min(self.slots, slots)  # what is given back is not used any more
        return LeaseRequest(
            self.principal,
            self.allowance,
            day,
            day[:7],
            rate=self._holding(self.rate, pace, idle),
            slots=TokenHolding(self.under_way, slots),
            of_day=self._holding(self.of_day, pace, idle),
            of_month=self._holding(self.of_month, pace, idle),
        )

    def leave(self, day: str) -> LeaseRequest:
        """Give everything back: this process ends."""
        return LeaseRequest(
            self.principal,
            self.allowance,
            day,
            day[:7],
            rate=self._holding(self.rate, 0, True),
            of_day=self._holding(self.of_day, 0, True),
            of_month=self._holding(self.of_month, 0, True),
        )

    def settled(self, asked: LeaseRequest, given: LeaseGrant, now: float) -> None:
        """The account has answered ``asked``."""
        of = asked.allowance  # they may have been changed since
        if self.rate is not None and of.rate is not None:
            credit = self._rest_of_share(asked.rate, given.rate_left) if self._fresh else 0
            self.rate.settled(asked.rate, given.rate, given.rate_left, credit)
        # Of a quota little is held, since that is lost with the process; its share of the rest is lent.
        if self.of_day is not None and of.day is not None:
            left = max(0, given.day_left + self.of_day.limit - of.day)
            self.of_day.settled(asked.of_day, given.of_day, left, int(left * self.share))
        if self.of_month is not None and of.month is not None:
            left = max(0, given.month_left + self.of_month.limit - of.month)
            self.of_month.settled(asked.of_month, given.of_month, left, int(left * self.share))
        self.slots, self._tight = given.slots, given.tight
        self._slots_heard = of.concurrency == self.allowance.concurrency
        self._wait_until = now + given.wait_ms / 1e3
        self.local = self._fresh = False
        self._rest(now)

    def on_own(self, now: float) -> None:
        """The store is away: go by this process's share of each limit."""
        self._fill(now)
        for kind in (self.of_day, self.of_month):
            if kind is not None:
                more = self._part(kind.left) if kind.have < 1 <= kind.left else 0
                kind.have, kind.lent, kind.left = kind.have + more, kind.lent + more, kind.left - more
                kind.least = 1
        if self.allowance.concurrency is not None:
            self.slots = self._part(self.allowance.concurrency)
            self._slots_heard, self._tight = True, False
        self.local, self._fresh = True, False
        self._rest(now)

    def _fill(self, now: float) -> None:
        """The bucket of this process alone; it begins with what it may still lend."""
        rate = self.rate
        if rate is None or self.allowance.rate is None:
            return
        pace, most = self.allowance.rate * self.share, max(1.0, self.allowance.burst * self.share)
        more = (now - self._heard_at) * pace if self.local else 1 - rate.least
        rate.have = min(most, max(0.0, rate.have + more))
        rate.least, rate.left = 1, 0
        self._wait_until = now + max(0.0, 1 - rate.have) / pace

    def _rest(self, now: float) -> None:
        self._asked = self._rate_denied = self._slots_denied = 0
        self._heard_at = now
        if now - self._last_at >= IDLE_S and (not self.under_way or self.allowance.concurrency is None):
            self.active = self._slots_heard = False

    def _wake(self, now: float) -> None:
        if self.local:
            self._fill(now)
            self._heard_at = now
        else:
            for kind in self._tokens:
                # Nothing is lent of a bucket or a quota that is known to be empty.
                empty = now < self._wait_until if kind is self.rate else kind.left < 1
                kind.lend(0 if empty else self._part(kind.left))
        self.active = True
        self._fresh = not self.local
        self._last_at = now
        self._activate(self)

    def _denied(self, kind: LeasedTokens, now: float) -> LimitReached:
        if kind is not self.rate:
            return LimitReached(kind.kind)
        self._rate_denied += 1
        return LimitReached(kind.kind, max(self._wait_until - now, 1 / (self.allowance.rate or 1)))

    def _due(self, now: float) -> bool:
        since = now - self._heard_at
        if since >= IDLE_S or self._rate_denied or self._slots_denied:
            return True
        if any(2 * kind.have < self._asked and (kind.left >= 1 or kind.have < 0) for kind in self._tokens):
            return True
        spare = self._tight and self.slots > self.under_way
        return since >= REFRESH_S and (self._asked > 0 or spare)

    def _room(self, limit: int) -> int:
        return min(limit, self.slots if self._slots_heard else max(self.slots, self._part(limit)))

    def _part(self, of: float) -> int:
        """This process's share, at least one."""
        return max(1, int(of * self.share))

    def _holding(self, kind: LeasedTokens | None, pace: int, idle: bool) -> TokenHolding:
        if kind is None:
            return TokenHolding()
        if idle or (self._fresh and kind is self.rate):
            return kind.holding(0)  # others may have lent too: first it is told what is left
        part = self._part(kind.left + max(kind.have, 0)) if kind is self.rate else 1
        return kind.holding(max(pace, part))

    def _rest_of_share(self, asked: TokenHolding, left: float) -> int:
        """Of what was there before this process lent, its share less what it has had."""
        spent = max(0, -asked.have)
        return max(0, int((left + spent) * self.share) - spent)

    def _slots_wanted(self, idle: bool) -> int:
        limit = self.allowance.concurrency
        if limit is None or idle:
            return self.under_way
        more = self.under_way + self._slots_denied
        return min(limit, more if self._tight else max(more, self._part(limit)))
