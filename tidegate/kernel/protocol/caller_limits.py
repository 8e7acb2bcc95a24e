"""The limits of a caller, as users state them: on a key, or for the tokens of an issuer."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from tidegate.kernel.protocol.access import Allowance, TokenAllowance
from tidegate.kernel.protocol.cost_facts import NANOS
from tidegate.kernel.protocol.models import Noun

# A burst must be at least the number of requests that the rate allows in this many seconds. A smaller token
# bucket would overflow between refills. Then the caller would get fewer requests than the rate allows.
MIN_BURST_S = 0.05
MOST_TOKENS = 10**12
MOST_MONEY = 10**6


class TokenLimits(Noun):
    """Limits of the tokens that a caller may use, in prompts and answers together. None means no limit."""

    tokens_per_minute: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description=("Maximum number of tokens in any 60 seconds.")
    )
    tokens_per_day: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="Maximum number of tokens in a calendar day (UTC)."
    )

    def token_allowance(self) -> TokenAllowance:
        """Return the limits in the form that gateways use."""
        return TokenAllowance(self.tokens_per_minute, self.tokens_per_day)


class CallerLimits(TokenLimits):
    """Limits of a caller. A limit applies to all gateway processes together. None means no limit."""

    rate: float | None = Field(None, gt=0, le=1e6, description="Requests per second.")
    burst: int | None = Field(
        None,
        ge=1,
        le=10**7,
        description=("Maximum number of requests in a burst; None: as many as the rate allows in a second."),
    )
    concurrency: int | None = Field(None, ge=1, le=10**6, description="Maximum number of requests in flight.")
    day: int | None = Field(
        None, ge=1, le=10**12, description="Maximum number of requests in a calendar day (UTC)."
    )
    month: int | None = Field(
        None, ge=1, le=10**12, description="Maximum number of requests in a calendar month (UTC)."
    )
    weight: int = Field(
        1, ge=1, le=100, description="Share of a busy Deployment, in proportion to other callers' weights."
    )
    budget_per_day: float | None = Field(
        None,
        gt=0,
        le=MOST_MONEY,
        description=("Highest cost in a calendar day (UTC), in the price list's currency."),
    )
    budget_per_month: float | None = Field(
        None,
        gt=0,
        le=MOST_MONEY,
        description="Highest cost in a calendar month (UTC), in the price list's currency.",
    )

    @model_validator(mode="after")
    def _burst_fits_rate(self) -> Self:
        if self.burst is None:
            return self
        if self.rate is None:
            raise ValueError("a burst needs a rate: set both, or leave the burst out")
        least = math.ceil(self.rate * MIN_BURST_S)
        if self.burst < least:
            raise ValueError(f"a rate of {self.rate:g}/s needs a burst of at least {least}")
        return self

    def allowance(self) -> Allowance:
        """Return the limits in the form that gateways use.

        Without a burst, use the number of requests that the rate allows in one second. Without a rate, use 1.
        """
        burst = self.burst or (1 if self.rate is None else max(1, math.ceil(self.rate)))
        budgets = (_nanos(self.budget_per_day), _nanos(self.budget_per_month))
        return Allowance(self.rate, burst, self.concurrency, self.day, self.month, *budgets)


def _nanos(money: float | None) -> int | None:
    return None if money is None else max(1, round(money * NANOS))
