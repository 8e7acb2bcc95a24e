"""The limits of callers that have a token of an issuer (a JWT)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from services.gateway.domain.jwt_claims import EVERYONE
from tidegate.kernel.protocol.access import JWT_PREFIX, Allowance, Principal, TokenAllowance
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
    become known or change. None: the principal has no limits, or was forgotten. ``busy``: returns True if the
    principal has requests. Then it is not forgotten, because these requests would no longer count.
    """

    def __init__(
        self,
        stated: Mapping[str, CallerLimits],
        set_limits: Callable[[str, Allowance | None], None],
        set_tokens: Callable[[str, TokenAllowance | None], None],
        *,
        busy: Callable[[str], bool] = lambda principal: False,
        clock: Callable[[], float] = time.monotonic,
        most: int = MOST_CALLERS,
    ) -> None:
        self._stated = stated
        self._set_limits = set_limits
        self._set_tokens = set_tokens
        self._busy = busy
        self._clock = clock
        self._most = most
        # Sorted by ``seen_at``, the oldest first.
        self._callers: dict[str, CallerRecord] = {}

    def verified(self, principal: Principal) -> None:
        """Apply the limits of its role to a caller whose token was just verified."""
        self._apply(principal.id, self._stated.get(principal.role, _NO_LIMITS))

    def unknown(self, principal: Principal) -> bool:
        """Apply the limits of its role to a caller with a JWT whose token this process has not verified.

        Another process has, for example if the caller has submitted a batch there. Return True if this call
        applied the limits.
        """
        if principal.id in self._callers or not principal.id.startswith(JWT_PREFIX):
            return False
        # A batch that an older release has stored does not name the role.
        limits = self._stated.get(principal.role) or self._stated.get(EVERYONE)
        if limits is None:
            return False
        self._apply(principal.id, limits)
        return True

    def _apply(self, principal: str, limits: CallerLimits) -> None:
        known = self._callers.pop(principal, None)
        now = self._clock()
        self._callers[principal] = CallerRecord(limits, now)
        if known is None or known.limits != limits:
            self._set(principal, limits)
            self._forget(now)

    def _set(self, principal: str, limits: CallerLimits) -> None:
        allowance, tokens = limits.allowance(), limits.token_allowance()
        self._set_limits(principal, None if allowance.unlimited else allowance)
        self._set_tokens(principal, None if tokens.unlimited else tokens)

    def _forget(self, now: float) -> None:
        while len(self._callers) > self._most:
            oldest = next(iter(self._callers))
            if now - self._callers[oldest].seen_at < FORGET_S:
                return
            record = self._callers.pop(oldest)
            if self._busy(oldest):
                self._callers[oldest] = record._replace(seen_at=now)
            else:
                self._set(oldest, _NO_LIMITS)
