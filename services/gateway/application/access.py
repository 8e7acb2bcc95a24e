"""Who calls, and what that caller may use: asked at every door, answered from memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import Counter

from services.gateway.domain.key_limiter import KeyLimiter, LimitReached
from services.gateway.domain.key_table import FOREVER, KeyTable
from services.gateway.domain.rate_limit_headers import left, seconds_left
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel.errors import Forbidden, TooMany, Unauthorized, Unavailable
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import ANONYMOUS, INFER, SCRAPER, SERVICE, Principal
from tidegate.kernel.service.caller import ServiceToken

LIMITED = Counter(
    "tidegate_gateway_limited_total", "Requests refused by a limit of their key.", ["key", "limit"]
)

Headers = dict[bytes, bytes]
# Who bears a token, and until when that may be believed (ms since the epoch); raises Unauthorized.
Verify = Callable[[bytes], tuple[Principal, float]]
# A caller's counts at an endpoint, in the order of ``tidegate.kernel.protocol.usage.COUNTS``.
Count = Callable[[str, str], list[int]]

REMEMBERED = 10_000
_BEARER = b"Bearer "
_WORDS = {
    "rate": (
        "rate_limited",
        "this key has reached its limit of requests per second: send again after Retry-After",
    ),
    "concurrency": (
        "too_many_concurrent",
        "this key has reached its limit of requests in flight: wait for one to end",
    ),
    "day": ("quota_exhausted", "this key has used up its requests for the day (UTC)"),
    "month": ("quota_exhausted", "this key has used up its requests for the month (UTC)"),
}


class Grant:
    """One admitted request. The first of :meth:`done`, :meth:`accepted` and :meth:`cancel` ends it."""

    __slots__ = ("_count", "_endpoint", "_meter", "_open", "_principal")

    def __init__(self, count: Count, principal: Principal, endpoint: str, meter: KeyLimiter | None) -> None:
        self._count = count
        self._principal = principal
        self._endpoint = endpoint
        self._meter = meter
        self._open = True

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the caller is told of its limits, as headers of the response."""
        if self._meter is None:
            return []
        return [
            (b"ratelimit-policy", self._meter.policy),
            (b"ratelimit", left(self._meter, time.time())),
        ]

    def done(
        self,
        *,
        compute_us: int = 0,
        received: int = 0,
        sent: int = 0,
        tokens_in: int = 0,
        tokens_out: int = 0,
        failed: bool = False,
    ) -> None:
        """The request is over: its share of the model's time in us, bytes of both bodies, tokens if known."""
        if not self._open:
            return
        self._open = False
        if self._meter is not None:
            self._meter.give()
        counts = self._count(self._principal.id, self._endpoint)
        counts[0] += 1
        counts[2] += compute_us
        counts[3] += received
        counts[4] += sent
        if failed:
            counts[1] += 1
        if tokens_in or tokens_out:
            counts[5] += tokens_in
            counts[6] += tokens_out

    def accepted(self, received: int) -> None:
        """The request is a job now: it counts as a request, with what it used, at its end."""
        if self._open:
            self.cancel()
            self._count(self._principal.id, self._endpoint)[3] += received

    def streamed(self, cost: UsageCost, received: int) -> None:
        """:meth:`done`, of a stream; :meth:`cancel`, where it was never queued."""
        if not cost.queued:
            self.cancel()
        self.done(
            compute_us=cost.compute_us,
            received=received,
            sent=cost.sent,
            tokens_in=cost.tokens_in,
            tokens_out=cost.tokens_out,
            failed=not cost.answers,
        )

    def cancel(self) -> None:
        """The request never reached a model: it was wrong, or refused by the gateway."""
        if self._open:
            self._open = False
            if self._meter is not None:
                self._meter.give()


class Access:
    """The gateway's word on every caller. ``required``: nobody without a credential is let in."""

    def __init__(
        self,
        *,
        required: bool,
        service_token: str,
        count: Count,
        meters: Mapping[str, KeyLimiter],
        verify: Verify | None = None,
    ) -> None:
        self.required = required
        self._token = ServiceToken(service_token)
        self._count = count
        self._meters = meters
        self._verify = verify
        self._table: KeyTable | None = None
        self._known: dict[bytes, tuple[Principal, float]] = {}

    def replace(self, table: KeyTable) -> None:
        """These are all keys now. Whoever was known is looked at again."""
        self._table = table
        self._known.clear()

    def problem(self) -> str | None:
        """Why nobody with a key can be let in, if so."""
        known = self._table is not None or not self.required
        return None if known else "Keys are not known yet: the registry has not been read."

    def authenticate(self, headers: Headers) -> Principal:
        """Who sends these headers; no I/O. Raises Unauthorized, or Unavailable while keys are unknown."""
        credential = headers.get(b"authorization")
        if credential is None:
            if self.required:
                raise Unauthorized(
                    "this stack needs a key: send 'Authorization: Bearer <key>' (the CLI and the SDK: "
                    "TIDEGATE_API_KEY); an admin makes one with `tidegate keys create NAME`"
                )
            return ANONYMOUS
        known = self._known.get(credential)
        if known is not None and time.time() * 1e3 < known[1]:
            return known[0]
        found = self._look(credential)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[credential] = found
        return found[0]

    def remembered(self, headers: Headers) -> Principal | None:
        """Return the bearer of a credential that was found good lately, or None."""
        known = self._known.get(headers.get(b"authorization", b""))
        return known[0] if known is not None else None

    def remembers(self, headers: Headers) -> bool:
        """Return True for a credential that was found good lately; costs one look into memory."""
        return headers.get(b"authorization", b"") in self._known

    def admit(self, principal: Principal, endpoint: str) -> Grant | None:
        """Let an inference request of ``principal`` to ``endpoint`` in; None: nothing is counted for it.

        Raises Forbidden for what the principal may not do, TooMany for what it has used up.
        """
        if principal is ANONYMOUS or principal is SERVICE:
            return None
        if not principal.may(INFER, endpoint):
            raise Forbidden(access.may_not_use(principal, endpoint))
        meter = self._meters.get(principal.id)
        if meter is not None:
            denied = meter.take(time.monotonic())
            if denied is not None:
                raise _too_many(denied, meter)
        return Grant(self._count, principal, endpoint, meter)

    def standing(self, principal: Principal) -> Principal:
        """Return a caller of earlier as it is now: its key may have been changed, revoked, or have expired.

        Raises Unauthorized for one that would not be let in any more, Unavailable while keys are unknown. A
        token of an issuer cannot be asked for again, so its bearer stays as it was.
        """
        if principal is ANONYMOUS and self.required:
            raise Unauthorized("this stack no longer takes callers without a key", reason="key_revoked")
        if principal is ANONYMOUS or principal is SERVICE or principal.id.startswith(access.JWT_PREFIX):
            return principal
        if self._table is None:
            raise _keys_unknown()
        key = self._table.keys.get(principal.id)
        if key is None or (key.expires_ms is not None and time.time() * 1e3 >= key.expires_ms):
            raise Unauthorized(
                f"the key {principal.id} is revoked or expired; `tidegate keys --all` lists all keys",
                reason="key_revoked",
            )
        return key.principal

    def _look(self, credential: bytes) -> tuple[Principal, float]:
        if self._token.given({b"authorization": credential}):
            return SERVICE, FOREVER
        if self._token.scrapes({b"authorization": credential}):
            return SCRAPER, FOREVER
        if not credential.startswith(_BEARER):
            raise Unauthorized("the credential must be 'Authorization: Bearer <key>'")
        bearer = credential[len(_BEARER) :]
        if access.key_id(bearer) is None:
            if self._verify is not None:
                return self._verify(bearer)
            raise Unauthorized(
                "this stack does not know the key: it does not look like one of its keys (tg_...); "
                "`tidegate keys` lists them"
            )
        if self._table is None:
            raise _keys_unknown()
        found = self._table.find(bearer, time.time() * 1e3)
        if found is None:
            raise Unauthorized(
                "this stack does not know the key: it is of another stack, revoked or expired; "
                "`tidegate keys --all` lists all keys"
            )
        key, until = found
        return key.principal, until


def _keys_unknown() -> Unavailable:
    return Unavailable(
        "this gateway does not know the keys yet: it has not reached the registry",
        reason="not_known_yet",
        retry_after_s=1.0,
    )


def _too_many(denied: LimitReached, meter: KeyLimiter) -> TooMany:
    LIMITED.labels(meter.principal, denied.limit).inc()
    reason, words = _WORDS[denied.limit]
    now = time.time()
    quota = denied.limit in ("day", "month")
    retry_after_s = seconds_left(denied.limit, now) if quota else denied.retry_after_s
    told = {
        "RateLimit-Policy": meter.policy.decode(),
        "RateLimit": left(meter, now).decode(),
    }
    return TooMany(words, reason=reason, retry_after_s=retry_after_s, told=told)
