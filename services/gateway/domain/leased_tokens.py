"""The tokens of one limit in a gateway process: leased from the account, or borrowed."""

from __future__ import annotations

import math

from services.gateway.domain.lease_messages import TokenHolding


class LeasedTokens:
    """Tokens of one limit, leased from the caller's account. ``kind``: the name of the limit.

    A request may take a token if ``held`` is at least ``minimum``. The usual minimum is 1. With a lower
    minimum, requests may take tokens that the account has not granted yet (credit).
    """

    __slots__ = ("available", "borrowed", "cut", "held", "kind", "limit", "minimum")

    def __init__(self, kind: str, limit: int) -> None:
        self.kind = kind
        self.limit = limit
        self.held: float = 0
        self.minimum: float = 1
        self.available: float = limit  # the tokens in the account at the last settlement
        self.borrowed: float = 0  # the part of ``held`` that the account has not granted yet
        self.cut: float = 0  # reported tokens that a lower limit has removed since the last report

    @property
    def remaining(self) -> int:
        """Return the number of remaining tokens, as far as this process knows."""
        found = int(self.available + self.held)
        return found if found > 0 else 0

    def borrow(self, share: int) -> None:
        """Allow requests to take ``share`` more tokens than are held, until the next settlement."""
        self.minimum = 1 - share

    def holding(self, wanted: int) -> TokenHolding:
        """Return the held and wanted tokens to report to the account."""
        self.cut = 0
        return TokenHolding(math.floor(self.held - self.borrowed), min(wanted, self.limit))

    def apply(self, reported: TokenHolding, granted: int, available: float, credit: int = 0) -> None:
        """Apply the account's answer to the report ``reported``.

        Tokens that were spent after the report are subtracted.
        """
        held = math.floor(self.held - self.borrowed + self.cut) - reported.held + granted
        # The limit may be lower now than at the report. So remove all tokens above the present limit.
        self.held, self.available = min(held, self.limit), min(available, self.limit)
        self.borrowed = self.cut = 0
        self.minimum = 1 - min(credit, self.limit)

    def change(self, limit: int) -> None:
        """Set a new limit. Spent tokens still count. At most ``limit`` tokens remain."""
        rest = self.available + self.held
        if self.kind != "rate" or self.available >= self.limit:
            rest += limit - self.limit  # the rest of a quota or a full bucket changes with its limit
        rest, held, reported = min(rest, limit), self.held, self.held - self.borrowed
        self.held = min(held, max(0, rest))
        self.borrowed = max(0, self.borrowed - (held - self.held))
        self.cut += reported - (self.held - self.borrowed)
        self.available = min(limit, max(0, rest - self.held))
        self.limit = limit

    def reset(self) -> None:
        """Begin a new period with the full limit. Tokens of the old period expire."""
        self.held = self.borrowed = self.cut = 0
        self.available = self.limit
