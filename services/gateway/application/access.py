"""Authenticate and admit callers of every API of the gateway, from data in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import Counter

from services.gateway.domain.budget import NOTHING
from services.gateway.domain.key_limiter import KeyLimiter, LimitReached
from services.gateway.domain.key_table import FOREVER, KeyTable
from services.gateway.domain.llm.token_headers import openai, requests_left
from services.gateway.domain.rate_limit_headers import seconds_left
from services.gateway.domain.request_costs import RequestCosts
from services.gateway.domain.routing import DeploymentRoute
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel.errors import Forbidden, TooMany, Unauthorized, Unavailable
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import ANONYMOUS, INFER, SCRAPER, SERVICE, Principal
from tidegate.kernel.service.caller import ServiceToken

LIMITED = Counter(
    "tidegate_gateway_limited_total", "Requests refused by a limit of their caller.", ["key", "limit"]
)

Headers = dict[bytes, bytes]
# A function that returns the principal of a token, and the time at which the token expires (Unix time in ms).
# The function raises Unauthorized if the token is not valid.
Verify = Callable[[bytes], tuple[Principal, float]]
# A function that returns the list of usage counts of a principal at an endpoint, in the order of
# ``tidegate.kernel.protocol.usage.COUNTS``. The code that calls it adds to the counts in this list.
Count = Callable[[str, str], list[int]]

REMEMBERED = 10_000
# Clients of language models always send a key. If the server needs none, users configure one of these words
# as the key. The caller is then anonymous.
_NO_KEYS = frozenset(
    b"Bearer " + word
    for word in (b"-", b"EMPTY", b"empty", b"none", b"dummy", b"ollama", b"not-needed", b"sk-no-key-required")
)
_BEARER = b"Bearer "
# SageMaker's clients send an access key and a cryptographic signature. The gateway uses the access key as the
# API key, and does not check the signature.
_AWS = b"AWS4-HMAC-SHA256 Credential="
_REFUSALS = {
    "rate": (
        "rate_limited",
        "this caller has reached its limit of requests per second: send again after Retry-After",
    ),
    "concurrency": (
        "too_many_concurrent",
        "this caller has reached its limit of requests in flight: wait until one of them ends",
    ),
    "day": (
        "quota_exhausted",
        "this caller has used up its requests for the day (UTC): send again after Retry-After",
    ),
    "month": (
        "quota_exhausted",
        "this caller has used up its requests for the month (UTC): send again after Retry-After",
    ),
    "day_budget": (
        "budget_exhausted",
        "this caller has used up its budget for the day (UTC): send again after Retry-After, or let an admin "
        "raise it with `tidegate keys change KEY --budget-per-day N` or, for a JWT, TIDEGATE_JWT_LIMITS",
    ),
    "month_budget": (
        "budget_exhausted",
        "this caller has used up its budget for the month (UTC): send again after Retry-After, or let an "
        "admin raise it with `tidegate keys change KEY --budget-per-month N` or, for a JWT, "
        "TIDEGATE_JWT_LIMITS",
    ),
}

_LEASING = (
    "budget_exhausted",
    "other requests or gateway processes hold the rest of this caller's budget: send again after Retry-After",
)


class Grant:
    """One admitted request, whose usage is counted once.

    The first call of :meth:`done`, :meth:`accepted` or :meth:`cancel` ends the request. Later calls do
    nothing.
    """

    __slots__ = ("_costs", "_count", "_endpoint", "_limiter", "_open", "_principal", "_reserved")

    def __init__(
        self,
        count: Count,
        principal: Principal,
        endpoint: str,
        limiter: KeyLimiter | None,
        costs: RequestCosts | None = None,
    ) -> None:
        self._count = count
        self._principal = principal
        self._endpoint = endpoint
        self._limiter = limiter
        self._costs = costs
        # The cost that the limiter has just reserved for this request.
        self._reserved = limiter.reserved if limiter is not None else NOTHING
        self._open = True

    @property
    def limiter(self) -> KeyLimiter | None:
        """The limiter of the caller's key; None if the key has no limits."""
        return self._limiter

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the response headers that show the caller's limits."""
        if self._limiter is None:
            return []
        return [
            (b"ratelimit-policy", self._limiter.policy),
            (b"ratelimit", self._limiter.remaining_header(time.time())),
        ]

    def done(
        self,
        *,
        compute_us: int = 0,
        received: int = 0,
        sent: int = 0,
        tokens_in: int = 0,
        tokens_out: int = 0,
        tokens_cached: int = 0,
        failed: bool = False,
        route: DeploymentRoute | None = None,
        whole_us: int = 0,
    ) -> None:
        """Count a request that has ended.

        ``compute_us``: the request's share of the time of its model call, in microseconds. ``whole_us``: the
        time of this whole model call, in microseconds; other requests may share the call. ``received``,
        ``sent``: the bytes of the request's body and of the response's body. ``route``: the Deployment that
        answered. If there was no answer, ``route`` is None and the caller's budget is not charged.
        """
        if not self._open:
            return
        self._open = False
        if self._limiter is not None:
            nanos = 0
            if self._limiter.budget is not None and route is not None and self._costs is not None:
                nanos = self._costs.of(route, compute_us, tokens_in, tokens_out, tokens_cached)
                self._costs.learn(self._endpoint, route, nanos, compute_us, whole_us)
            self._limiter.finish(self._reserved, nanos)
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
        """Count the ``received`` bytes of a request that became a job.

        All other usage is counted when the job ends. This process does not learn the real cost of the job. So
        it charges the caller's budget the mean cost of the endpoint's requests.
        """
        if self._open:
            self._end(0 if self._costs is None else self._costs.mean(self._endpoint))
            self._count(self._principal.id, self._endpoint)[3] += received

    def streamed(self, cost: UsageCost, received: int) -> None:
        """Count an ended request with the usage in ``cost``. If it was never queued, do not count it.

        A request that was never queued is cancelled. After that, :meth:`done` does nothing.
        """
        if not cost.queued:
            self.cancel()
        self.done(
            compute_us=cost.compute_us,
            received=received,
            sent=cost.sent,
            tokens_in=cost.tokens_in,
            tokens_out=cost.tokens_out,
            tokens_cached=cost.tokens_cached,
            failed=not cost.answers,
            route=cost.route,
            whole_us=cost.whole_us,
        )

    def cancel(self) -> None:
        """End the request without counting it, for example because the gateway refused it."""
        if self._open:
            self._end(0)

    def _end(self, nanos: int) -> None:
        self._open = False
        if self._limiter is not None:
            self._limiter.finish(self._reserved, nanos)


class Access:
    """The gateway's access control. If ``required``, every caller needs a credential."""

    def __init__(
        self,
        *,
        required: bool,
        service_token: str,
        count: Count,
        limiters: Mapping[str, KeyLimiter],
        verify: Verify | None = None,
        costs: RequestCosts | None = None,
        limit_unknown: Callable[[Principal], bool] | None = None,
    ) -> None:
        """``limit_unknown``: called with a principal that has no limiter.

        It returns True if it has applied limits.
        """
        self._costs = costs
        self._limit_unknown = limit_unknown
        self.required = required
        self._token = ServiceToken(service_token)
        self._count = count
        self._limiters = limiters
        self._verify = verify
        self._table: KeyTable | None = None
        self._known: dict[bytes, tuple[Principal, float]] = {}

    def replace(self, table: KeyTable) -> None:
        """Replace the table of keys, and forget which credentials were checked."""
        self._table = table
        self._known.clear()

    def problem(self) -> str | None:
        """Return why keys cannot be checked now, or None if they can."""
        known = self._table is not None or not self.required
        return None if known else "This gateway does not know the keys yet: it has not reached the registry."

    def authenticate(self, headers: Headers) -> Principal:
        """Return the principal that sent these headers, without I/O.

        Raises Unauthorized if the credential is not valid, or if it is missing and ``required`` is True.
        Raises Unavailable if the gateway needs the table of keys and has not received it yet.
        """
        credential = headers.get(b"authorization")
        if credential is None:
            if self.required:
                raise Unauthorized(
                    "this stack needs a key: send 'Authorization: Bearer <key>' (the CLI and the SDK: "
                    "TIDEGATE_API_KEY); an admin makes one with `tidegate keys create NAME`"
                )
            return ANONYMOUS
        if credential.startswith(_AWS):
            credential = _BEARER + credential[len(_AWS) :].partition(b"/")[0]
        known = self._known.get(credential)
        if known is not None and time.time() * 1e3 < known[1]:
            return known[0]
        if not self.required and credential in _NO_KEYS:
            return ANONYMOUS
        checked = self._check(credential)
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[credential] = checked
        return checked[0]

    def remembered(self, headers: Headers) -> Principal | None:
        """Return the principal of the credential if it was checked recently, else None."""
        known = self._known.get(headers.get(b"authorization", b""))
        return known[0] if known is not None else None

    def remembers(self, headers: Headers) -> bool:
        """Return True if the credential was checked recently. This costs one dictionary lookup."""
        return headers.get(b"authorization", b"") in self._known

    def admit(self, principal: Principal, endpoint: str) -> Grant | None:
        """Admit an inference request of ``principal`` to ``endpoint``.

        Return None for a principal whose usage is not counted: an anonymous caller or a service. Raises
        Forbidden if the principal may not use the endpoint, TooMany if a limit is reached.
        """
        if principal is ANONYMOUS or principal is SERVICE:
            return None
        if not principal.may(INFER, endpoint):
            raise Forbidden(access.may_not_use(principal, endpoint))
        limiter = self._limiters.get(principal.id)
        if limiter is None and self._limit_unknown is not None and self._limit_unknown(principal):
            limiter = self._limiters.get(principal.id)
        if limiter is not None:
            nanos = 0
            if limiter.budget is not None and self._costs is not None:
                nanos = self._costs.most(endpoint)
            reached = limiter.take(time.monotonic(), nanos)
            if reached is not None:
                raise _too_many(reached, limiter)
        return Grant(self._count, principal, endpoint, limiter, self._costs)

    def recheck(self, principal: Principal) -> Principal:
        """Return a principal with the current permissions of its key.

        Raises Unauthorized if the key is no longer valid, Unavailable before the keys are known. A principal
        with a JWT is returned unchanged, because the gateway does not store tokens.
        """
        if principal is ANONYMOUS and self.required:
            raise Unauthorized(
                "this stack no longer accepts calls without a key: submit the requests again with a key",
                reason="key_revoked",
            )
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

    def _check(self, credential: bytes) -> tuple[Principal, float]:
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
                "this stack does not know the key. A key of this stack begins with tg_; `tidegate keys` "
                "lists all keys"
            )
        if self._table is None:
            raise _keys_unknown()
        entry = self._table.find(bearer, time.time() * 1e3)
        if entry is None:
            raise Unauthorized(
                "this stack does not know the key: it belongs to another stack, or is revoked or expired; "
                "`tidegate keys --all` lists all keys"
            )
        key, until = entry
        return key.principal, until


def label_of(principal: str) -> str:
    """Return the label of a caller in metrics: a key's id, or ``jwt`` for all tokens of an issuer.

    An issuer may have any number of users, so their names do not become labels.
    """
    return "jwt" if principal.startswith(access.JWT_PREFIX) else principal


def _keys_unknown() -> Unavailable:
    return Unavailable(
        "this gateway does not know the keys yet: it has not reached the registry",
        reason="not_known_yet",
        retry_after_s=1.0,
    )


def _too_many(reached: LimitReached, limiter: KeyLimiter) -> TooMany:
    LIMITED.labels(label_of(limiter.principal), reached.limit).inc()
    reason, message = _LEASING if reached.soon else _REFUSALS[reached.limit]
    now = time.time()
    period = reached.limit.partition("_")[0]
    whole = period in ("day", "month") and not reached.soon
    retry_after_s = seconds_left(period, now) if whole else reached.retry_after_s
    headers = {
        "RateLimit-Policy": limiter.policy.decode(),
        "RateLimit": limiter.remaining_header(now).decode(),
        **{name.decode(): value.decode() for name, value in openai(requests_left(limiter, now), ())},
    }
    return TooMany(message, reason=reason, retry_after_s=retry_after_s, headers=headers)
