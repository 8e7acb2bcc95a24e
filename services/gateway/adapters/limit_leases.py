"""Report to the store how much callers used of their limits, and renew this process's leases.

A lease is a part of a limit that this process may use. The exchange with the store runs in the background, so
requests do not wait for the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from prometheus_client import Counter, Gauge

from services.gateway.adapters.store.limit_accounts import LimitAccounts
from services.gateway.domain.key_limiter import KeyLimiter
from services.gateway.domain.lease_messages import LeaseRequest, PriorUsage
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.access import JWT_PREFIX, Allowance
from tidegate.kernel.store import StoreUnavailable

log = telemetry.logger(__name__)

LOCAL = Gauge(
    "tidegate_gateway_limits_local",
    "1 while the store does not answer and this process applies only its own share of every limit.",
    multiprocess_mode="max",
)
ON_OWN = Counter(
    "tidegate_gateway_limits_on_own_total",
    "Reports of callers' usage that could not be sent to the store.",
)

TICK_S = 0.02
SLOW_S = 0.5  # a store that takes longer is treated as unavailable
RETRY_S = 0.5
SEED_RETRY_S = 5.0
# At most this many reads of earlier usage are in flight. At midnight, each caller with a quota needs one.
SEEDS_AT_ONCE = 8
ACCOUNTS_PER_CALL = 256

# A function that returns how many requests of a principal the registry counted on a day, and in the month of
# that day.
ReadPriorUsage = Callable[[str, str], Awaitable[PriorUsage]]


class LimitLeases:
    """The limiters of this process, and the task that renews their leases from the accounts in the store.

    ``processes``: returns the number of processes that share the accounts.
    """

    def __init__(
        self,
        store: LimitAccounts,
        process: str,
        processes: Callable[[], int],
        read_prior_usage: ReadPriorUsage,
    ) -> None:
        self._store = store
        self._process = process
        self._processes = processes
        self._read_prior_usage = read_prior_usage
        self._active: dict[KeyLimiter, None] = {}
        self._seeding: dict[str, asyncio.Task[None]] = {}
        self._seeds = asyncio.Semaphore(SEEDS_AT_ONCE)
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._day = ""
        self._away_since: float | None = None
        self._retry_at = 0.0
        # The class `Access` has a reference to this dict. So change the dict in place, and never replace it.
        self.limiters: dict[str, KeyLimiter] = {}

    def start(self) -> None:
        """Start the task that renews the leases in the background."""
        self._task = asyncio.create_task(self._run(), name="limits")

    async def stop(self) -> None:
        """Stop the task, and return the unused part of each lease to the accounts in the store.

        The unused part consists of tokens of the limits, and of places for requests that run at the same
        time.
        """
        await tasks.end(self._task, *self._seeding.values())
        with contextlib.suppress(TimeoutError, StoreUnavailable):
            async with asyncio.timeout(SLOW_S):
                active = [limiter for limiter in self.limiters.values() if limiter.active]
                requests = [limiter.release_request(self._day) for limiter in active]
                await self._store.settle(self._process, requests)

    def replace(self, allowances: dict[str, Allowance]) -> None:
        """Set the limits of all keys. A key that had limits before keeps its usage.

        The limits of callers with a JWT do not change.
        """
        kept = {id_: each for id_, each in self.limiters.items() if id_.startswith(JWT_PREFIX)}
        for principal, allowance in allowances.items():
            kept[principal] = self._limiter(principal, allowance)
        self.limiters.clear()
        self.limiters.update(kept)

    def set(self, principal: str, allowance: Allowance | None) -> None:
        """Set the limits of one caller with a JWT, and keep its usage.

        None: remove its limits, and its usage in this process.
        """
        if allowance is None:
            self.limiters.pop(principal, None)
        else:
            self.limiters[principal] = self._limiter(principal, allowance)

    def busy(self, principal: str) -> bool:
        """Return True if a caller has requests in flight, or tokens that are not returned yet."""
        limiter = self.limiters.get(principal)
        return limiter is not None and limiter.active

    def _limiter(self, principal: str, allowance: Allowance) -> KeyLimiter:
        limiter = self.limiters.get(principal)
        if limiter is None:
            limiter = KeyLimiter(principal, allowance, self._activate)
            limiter.share = self._share()
        elif limiter.allowance != allowance:
            limiter.change(allowance, time.monotonic())
        return limiter

    def _activate(self, limiter: KeyLimiter) -> None:
        limiter.share = self._share()
        self._active[limiter] = None
        self._woken.set()

    def _share(self) -> float:
        return 1 / max(1, self._processes())

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S if self._active else 1.0):
                    await self._woken.wait()
            self._note_day()
            try:
                await self._settle_due()
            except Exception:
                log.exception("the usage of limits could not be reported to the store")
                await asyncio.sleep(RETRY_S)

    def _note_day(self) -> None:
        day = datetime.now(UTC).date().isoformat()
        if day != self._day:
            for limiter in self.limiters.values() if self._day else ():
                limiter.new_day(new_month=day[:7] != self._day[:7])
            self._day = day

    async def _settle_due(self) -> None:
        now, share = time.monotonic(), self._share()
        if self._away_since is not None and now < self._retry_at:
            self._use_own_share(now)
            self._drop_idle()
            return
        due: list[tuple[KeyLimiter, LeaseRequest]] = []
        for limiter in list(self._active):
            limiter.share = share
            request = limiter.lease_request(now, self._day)
            if request is not None:
                due.append((limiter, request))
        try:
            for at in range(0, len(due), ACCOUNTS_PER_CALL):
                await self._settle(due[at : at + ACCOUNTS_PER_CALL])
        except (StoreUnavailable, TimeoutError) as error:
            self._note_away(str(error) or f"no answer within {SLOW_S} s")
            self._use_own_share(time.monotonic())
        self._drop_idle()

    async def _settle(self, due: list[tuple[KeyLimiter, LeaseRequest]]) -> None:
        async with asyncio.timeout(SLOW_S):
            grants = await self._store.settle(self._process, [request for _, request in due])
        if self._away_since is not None:
            log.info("the store answers again; limits apply to all processes together")
            self._away_since = None
            LOCAL.set(0)
        now = time.monotonic()
        for (limiter, request), grant in zip(due, grants, strict=True):
            limiter.apply(request, grant, now)
            if not grant.seeded and limiter.principal not in self._seeding:
                seeding = asyncio.create_task(self._seed(limiter.principal, request.day), name="limits seed")
                self._seeding[limiter.principal] = seeding

    def _note_away(self, problem: str) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if self._away_since is None:
            self._away_since = time.monotonic()
            LOCAL.set(1)
            log.warning(
                "the store does not answer; this process applies its own share of every limit",
                extra={"problem": problem},
            )

    def _use_own_share(self, now: float) -> None:
        ON_OWN.inc(len(self._active))
        for limiter in self._active:
            limiter.use_own_share(now)

    def _drop_idle(self) -> None:
        for limiter in [limiter for limiter in self._active if not limiter.active]:
            del self._active[limiter]

    async def _seed(self, principal: str, day: str) -> None:
        """Add the registry's count of a principal's requests to the principal's new account.

        Without this, the principal could use its whole quota again.
        """
        try:
            async with self._seeds:
                await self._store.seed(await self._read_prior_usage(principal, day))
        except TidegateError as error:
            log.warning(
                "a quota counts from zero until the registry reports the earlier usage",
                extra={"key": principal, "problem": error.message},
            )
            await asyncio.sleep(SEED_RETRY_S)
        finally:
            del self._seeding[principal]
