"""The limits of callers that have a token of an issuer (a JWT)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from services.gateway.domain.jwt_claims import EVERYONE
from tidegate.kernel.protocol.access import JWT_PREFIX, Allowance, TokenAllowance
from tidegate.kernel.protocol.caller_limits import CallerLimits

# A caller may be forgotten if its token was not verified for this many seconds. The gateway trusts a verified
# token for a shorter time, so the caller's next request sets its limits again.
FORGET_S = 900.0
# Callers are forgotten only if there are more than this many.
MOST_CALLERS = 20_000
_NO_LIMITS = CallerLimits()


class CallerRecord(NamedTuple):
    """A caller's limits. ``seen_at``: the monotonic time at which a token of the caller was last verified."""

    limits: CallerLimits
    seen_at: float


class JwtCallers:
    """The callers with a JWT, and their limits.

    ``stated``: the limits by role, and under ``*`` the limits of callers without one of these roles.
    ``set_limits``, ``set_tokens``: called with a principal and its limits of requests or of tokens, when they
    become known or change. None: the principal has no limits, or was forgotten.
    """

    def __init__(
        self,
        stated: Mapping[str, CallerLimits],
        set_limits: Callable[[str, Allowance | None], None],
        set_tokens: Callable[[str, TokenAllowance | None], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        most: int = MOST_CALLERS,
    ) -> None:
        self._everyone = stated.get(EVERYONE)
        self._set_limits = set_limits
        self._set_tokens = set_tokens
        self._clock = clock
        self._most = most
        # Sorted by ``seen_at``, the oldest first.
        self._callers: dict[str, CallerRecord] = {}

    def verified(self, principal: str, limits: CallerLimits | None) -> None:
        """Apply limits to a caller whose token was just verified. ``limits`` None: no limit."""
        limits = limits or _NO_LIMITS
        known = self._callers.pop(principal, None)
        now = self._clock()
        self._callers[principal] = CallerRecord(limits, now)
        if known is None or known.limits != limits:
            self._set(principal, limits)
            self._forget(now)

    def unknown(self, principal: str) -> bool:
        """Apply the limits under ``*`` to a caller with a JWT that this process has not verified.

        Such a caller continues work that it began earlier, for example a batch. Return True if this call
        applied the limits.
        """
        if self._everyone is None or not principal.startswith(JWT_PREFIX) or principal in self._callers:
            return False
        self.verified(principal, self._everyone)
        return True

    def _set(self, principal: str, limits: CallerLimits) -> None:
        allowance, tokens = limits.allowance(), limits.token_allowance()
        self._set_limits(principal, None if allowance.unlimited else allowance)
        self._set_tokens(principal, None if tokens.unlimited else tokens)

    def _forget(self, now: float) -> None:
        while len(self._callers) > self._most:
            oldest = next(iter(self._callers))
            if now - self._callers[oldest].seen_at < FORGET_S:
                return
            del self._callers[oldest]
            self._set(oldest, _NO_LIMITS)
