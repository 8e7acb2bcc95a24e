"""Admit requests to language models, and count their tokens for limits, usage, metrics and the load."""

from __future__ import annotations

import time
from typing import Protocol

from services.gateway.application.access import Access, Grant
from services.gateway.application.llm.meter import CallMeter, LlmMeters
from services.gateway.application.llm.token_limits import Reservation, TokenLimits
from services.gateway.domain.llm.estimate import TokenEstimate
from services.gateway.domain.llm.token_headers import Header, joined, openai, rate_limit, requests_left
from services.gateway.domain.request_costs import HEADER, RequestCosts
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.llm import Band
from tidegate.kernel.protocol.presence import GatewayLoad


class Accounted(Protocol):
    """The fields of a call that :class:`CallAccount` reads."""

    principal: Principal
    band: Band
    received: int
    cost: UsageCost
    estimate: TokenEstimate
    usage: tuple[int, int, int]

    @property
    def stated(self) -> bool:
        """True if the request sets a limit for the tokens of its answer."""

    @property
    def streamed(self) -> bool:
        """True if the caller wants the answer as a stream of events."""


class CallAccount:
    """The account of one admitted request.

    The calling code must call :meth:`close` at the end of the request.
    """

    __slots__ = (
        "_call",
        "_costs",
        "_endpoint",
        "_events",
        "_limits",
        "_load",
        "_meter",
        "_reservation",
        "grant",
        "left",
    )

    def __init__(
        self,
        call: Accounted,
        endpoint: str,
        grant: Grant | None,
        reservation: Reservation | None,
        limits: TokenLimits,
        meter: CallMeter,
        load: GatewayLoad,
        costs: RequestCosts | None = None,
    ) -> None:
        self._costs = costs
        self._call = call
        self._endpoint = endpoint
        self.grant = grant
        self._reservation = reservation
        self._limits = limits
        self._meter = meter
        self._load: GatewayLoad | None = load
        self._events = 0
        # True if the caller disconnected before the end of its answer.
        self.left = False
        load.waiting += 1
        load.waiting_tokens += call.estimate.prompt

    def headers(self) -> list[Header]:
        """Return the response headers that show the caller's limits.

        If the answer is not a stream, the headers also show its cost.
        """
        found = [] if self.grant is None else self.grant.headers()
        cost, route = self._call.cost, self._call.cost.route
        if self._costs is not None and route is not None and not self._call.streamed:
            tokens = cost.tokens_in, cost.tokens_out, cost.tokens_cached
            nanos = self._costs.of(route, cost.compute_us, *tokens)
            found = [*found, (HEADER, self._costs.text(nanos))]
        states = [] if self._reservation is None else self._reservation.states()
        limiter = None if self.grant is None else self.grant.limiter
        if states:
            found = joined([*found, *rate_limit(states)])
        return found + openai(requests_left(limiter, time.time()), states)

    def answered(self, usage: tuple[int, int, int] | None, events: int, compute_s: float) -> None:
        """Add the next events of the answer to the account.

        ``usage``: the prompt, answer and cached tokens of the request so far; None if unknown. ``events``:
        the number of new events. ``compute_s``: the seconds in the engine so far.
        """
        self._started()
        self._events += events
        self._meter.events(usage, events, compute_s)
        if usage is not None and self._reservation is not None:
            self._reservation.used(usage[0] + usage[1])

    def close(self) -> None:
        """Count the final usage of the request, and correct its charge.

        The calling code must call this method once, at the end of the request.
        """
        self._started()
        call, (prompt, answer, _) = self._call, self._call.usage
        if self._reservation is not None:
            tokens = prompt + answer
            if self.left and call.cost.queued and not tokens:
                # Even if the caller disconnected before the first event, the engine may have read the prompt.
                # So charge the estimated prompt tokens.
                tokens = min(call.estimate.prompt, self._reservation.charged)
            elif call.cost.answers and call.estimate.answer and not tokens:
                # The upstream reported no usage. Keep the charge, so that token limits still apply.
                tokens = self._reservation.charged
            self._reservation.settle(tokens)
        if prompt:
            # Learn the ratio of real to estimated prompt tokens. Only keys with token limits get a ratio of
            # their own, so that the number of stored ratios stays small.
            caller = call.principal.id if self._reservation is not None else ""
            self._limits.ratio.learn(self._endpoint, call.estimate.prompt, prompt, caller)
        self._meter.end()
        if self.grant is not None:
            if not (prompt or answer) and self._events and call.estimate.answer:
                # Some upstreams report usage only at the end of a stream. If the caller disconnected earlier,
                # the usage is unknown. Then count an estimate.
                call.cost.tokens_in = call.estimate.prompt
                call.cost.tokens_out = min(self._events, call.estimate.answer)
            self.grant.streamed(call.cost, call.received)

    def _started(self) -> None:
        """Record that the request no longer waits."""
        if self._load is not None:
            self._load.waiting -= 1
            self._load.waiting_tokens -= self._call.estimate.prompt
            self._load = None


class LlmAccounting:
    """Admits requests to language models, and opens their accounts."""

    def __init__(self, access: Access, limits: TokenLimits, costs: RequestCosts | None = None) -> None:
        """With ``costs``, answers that are not streams get a header with their cost."""
        self._costs = costs
        self._access = access
        self._limits = limits
        self.meters = LlmMeters()

    async def open(self, call: Accounted, endpoint: str, load: GatewayLoad) -> CallAccount:
        """Admit a request, and return its account.

        Raise Forbidden if the caller may not use the endpoint. Raise TooMany if a limit is reached. Raise
        BadRequest if the request is larger than a limit. ``load`` is the gateway's load of the Deployment
        that runs the request.
        """
        grant = self._access.admit(call.principal, endpoint)
        try:
            reservation = await self._limits.reserve(
                call.principal, endpoint, call.estimate.prompt, call.estimate.answer, stated=call.stated
            )
        except BaseException:
            if grant is not None:
                grant.cancel()
            raise
        meter = self.meters.begin(endpoint, call.band, streamed=call.streamed)
        return CallAccount(call, endpoint, grant, reservation, self._limits, meter, load, self._costs)

    async def charge_job(
        self, principal: Principal, endpoint: str, tokens: TokenEstimate, *, stated: bool
    ) -> Reservation | None:
        """Charge the estimated tokens of a job when the job is accepted.

        This process does not learn the real number of tokens, so the charge stays. Return None if the caller
        has no token limit. Raise TooMany if a limit is reached. Raise BadRequest if the job is larger than a
        limit.
        """
        return await self._limits.reserve(principal, endpoint, tokens.prompt, tokens.answer, stated=stated)
