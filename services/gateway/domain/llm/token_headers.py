"""Headers that show a caller's token limits: ``RateLimit`` and OpenAI's ``x-ratelimit-*``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from services.gateway.domain.key_limiter import KeyLimiter
from services.gateway.domain.llm.token_window import DAY_S, WINDOW_S, TokenBalance
from services.gateway.domain.rate_limit_headers import seconds_left
from tidegate.kernel.protocol.access import TokenAllowance

Header = tuple[bytes, bytes]


class TokenAccount(NamedTuple):
    """The token account of a caller, for one endpoint or all.

    ``endpoint``: the endpoint to which ``limit`` applies; empty means all endpoints.
    """

    principal: str
    endpoint: str
    limit: TokenAllowance

    @property
    def id(self) -> str:
        """Return the account's name in the store.

        It is unique, because the ids of keys contain no space, and callers with a JWT have no limits at
        single endpoints.
        """
        return f"{self.principal} {self.endpoint}" if self.endpoint else self.principal


class Left(NamedTuple):
    """The remainder of one limit.

    ``rest``: how many tokens or requests remain. ``reset_s``: seconds until the full limit is available
    again.
    """

    name: str
    limit: int
    rest: int
    reset_s: float


def tokens_left(account: TokenAccount, balance: TokenBalance, charged: int) -> list[Left]:
    """Return what remains of an account's limits after a charge of ``charged`` tokens.

    ``balance``: the account's state before this charge.
    """
    end = f"-{account.endpoint}" if account.endpoint else ""
    limit, found = account.limit, []
    if limit.minute is not None:
        # The window counts tokens by whole seconds, so a charge counts for up to one second longer than the
        # window.
        reset_s = WINDOW_S + 1.0 if charged else balance.reset_ms / 1e3
        rest = max(0, limit.minute - balance.used - charged)
        found.append(Left(f"tokens-minute{end}", limit.minute, rest, reset_s))
    if limit.day is not None:
        rest = max(0, limit.day - balance.day_used - charged)
        found.append(Left(f"tokens-day{end}", limit.day, rest, balance.day_ms / 1e3))
    return found


def requests_left(limiter: KeyLimiter | None, epoch_s: float) -> Left | None:
    """Return what remains of a key's limit for requests; None if the key has no such limit.

    The rate limit is used if the key has one. Otherwise, the daily quota is used, or else the monthly quota.
    """
    if limiter is None:
        return None
    allowance, rate = limiter.allowance, limiter.rate
    if rate is not None and allowance.rate is not None:
        rest = min(allowance.burst, rate.remaining)
        return Left("rate", allowance.burst, rest, (allowance.burst - rest) / allowance.rate)
    for name, quota in (("day", limiter.day_quota), ("month", limiter.month_quota)):
        if quota is not None:
            return Left(name, quota.limit, quota.remaining, seconds_left(name, epoch_s))
    return None


def rate_limit(states: Iterable[Left]) -> list[Header]:
    """Return the headers ``RateLimit-Policy`` and ``RateLimit`` for token limits."""
    states = list(states)
    policies = [
        f'"{each.name}";q={each.limit};w={WINDOW_S if "minute" in each.name else DAY_S};qu="tokens"'
        for each in states
    ]
    rests = [f'"{each.name}";r={each.rest};t={-int(-each.reset_s // 1)}' for each in states]
    return [(b"ratelimit-policy", ", ".join(policies).encode()), (b"ratelimit", ", ".join(rests).encode())]


def openai(requests: Left | None, tokens: Iterable[Left]) -> list[Header]:
    """Return OpenAI's headers. Of several token limits, show the one with the fewest remaining tokens."""
    tightest = min(tokens, key=lambda each: each.rest, default=None)
    found: list[Header] = []
    for kind, each in (("requests", requests), ("tokens", tightest)):
        if each is not None:
            found += [
                (f"x-ratelimit-limit-{kind}".encode(), b"%d" % each.limit),
                (f"x-ratelimit-remaining-{kind}".encode(), b"%d" % each.rest),
                (f"x-ratelimit-reset-{kind}".encode(), duration(each.reset_s).encode()),
            ]
    return found


def joined(headers: Iterable[Header]) -> list[Header]:
    """Return the headers with each name only once.

    The values of a repeated name are joined by commas.
    """
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        found[name] = found[name] + b", " + value if name in found else value
    return list(found.items())


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: ``850ms``, ``7s``, ``6m0s``, ``23h59m1s``."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1e3))}ms"
    whole = -int(-seconds // 1)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}h{minutes}m{whole % 60}s"
    return f"{minutes}m{whole % 60}s" if minutes else f"{whole}s"
