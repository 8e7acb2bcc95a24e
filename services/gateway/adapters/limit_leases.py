"""Settles the meters of this process with the accounts in the store, off the hot path."""

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
from tidegate.kernel.protocol.access import Allowance
from tidegate.kernel.store import StoreUnavailable

log = telemetry.logger(__name__)

LOCAL = Gauge(
    "tidegate_gateway_limits_local",
    "1 while the store is away and this process goes by its own share of every limit.",
    multiprocess_mode="max",
)
ON_OWN = Counter(
    "tidegate_gateway_limits_on_own_total", "Looks at a caller's limits that had to do without the store."
)

TICK_S = 0.02
SLOW_S = 0.5  # a store that takes longer is away
RETRY_S = 0.5
SEED_RETRY_S = 5.0
AT_ONCE = 256

# What the registry knows of a principal's requests on a day and in its month.
ReadUsed = Callable[[str, str], Awaitable[PriorUsage]]


class LimitLeases:
    """Makes meters and keeps them settled. ``processes``: how many gateway processes share the accounts."""

    def __init__(
        self, store: LimitAccounts, process: str, processes: Callable[[], int], read_used: ReadUsed
    ) -> None:
        self._store = store
        self._process = process
        self._processes = processes
        self._read_used = read_used
        self._active: dict[KeyLimiter, None] = {}
        self._seeding: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._day = ""
        self._away_since: float | None = None
        self._retry_at = 0.0
        self.meters: dict[str, KeyLimiter] = {}  # always this one: every request looks into it

    def start(self) -> None:
        """Begin settling."""
        self._task = asyncio.create_task(self._run(), name="limits")

    async def stop(self) -> None:
        """Give back what is held, and stop."""
        await tasks.end(self._task, *self._seeding.values())
        with contextlib.suppress(TimeoutError, StoreUnavailable):
            async with asyncio.timeout(SLOW_S):
                asks = [meter.leave(self._day) for meter in self.meters.values() if meter.active]
                await self._store.settle(self._process, asks)

    def replace(self, allowances: dict[str, Allowance]) -> None:
        """These are all callers that have limits; who had some before keeps what it holds and has spent."""
        kept: dict[str, KeyLimiter] = {}
        now = time.monotonic()
        for principal, allowance in allowances.items():
            meter = self.meters.get(principal)
            if meter is None:
                meter = KeyLimiter(principal, allowance, self._activate)
                meter.share = self._share()
            elif meter.allowance != allowance:
                meter.change(allowance, now)
            kept[principal] = meter
        self.meters.clear()
        self.meters.update(kept)

    def _activate(self, meter: KeyLimiter) -> None:
        meter.share = self._share()
        self._active[meter] = None
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
                await self._round()
            except Exception:
                log.exception("limits were not settled")
                await asyncio.sleep(RETRY_S)

    def _note_day(self) -> None:
        day = datetime.now(UTC).date().isoformat()
        if day != self._day:
            for meter in self.meters.values() if self._day else ():
                meter.new_day(new_month=day[:7] != self._day[:7])
            self._day = day

    async def _round(self) -> None:
        now, share = time.monotonic(), self._share()
        if self._away_since is not None and now < self._retry_at:
            self._on_own(now)
            self._let_rest()
            return
        asks: list[tuple[KeyLimiter, LeaseRequest]] = []
        for meter in list(self._active):
            meter.share = share
            ask = meter.ask(now, self._day)
            if ask is not None:
                asks.append((meter, ask))
        try:
            for at in range(0, len(asks), AT_ONCE):
                await self._settle(asks[at : at + AT_ONCE])
        except (StoreUnavailable, TimeoutError) as error:
            self._went_away(str(error) or "the store is slow")
            self._on_own(time.monotonic())
        self._let_rest()

    async def _settle(self, asks: list[tuple[KeyLimiter, LeaseRequest]]) -> None:
        async with asyncio.timeout(SLOW_S):
            answers = await self._store.settle(self._process, [ask for _, ask in asks])
        if self._away_since is not None:
            log.info("the store is back; limits are shared again")
            self._away_since = None
            LOCAL.set(0)
        now = time.monotonic()
        for (meter, ask), given in zip(asks, answers, strict=True):
            meter.settled(ask, given, now)
            if not given.seeded and meter.principal not in self._seeding:
                seeding = asyncio.create_task(self._seed(meter.principal, ask.day), name="limits seed")
                self._seeding[meter.principal] = seeding

    def _went_away(self, problem: str) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if self._away_since is None:
            self._away_since = time.monotonic()
            LOCAL.set(1)
            log.warning(
                "the store is away; limits are this process's share of them", extra={"problem": problem}
            )

    def _on_own(self, now: float) -> None:
        ON_OWN.inc(len(self._active))
        for meter in self._active:
            meter.on_own(now)

    def _let_rest(self) -> None:
        for meter in [meter for meter in self._active if not meter.active]:
            del self._active[meter]

    async def _seed(self, principal: str, day: str) -> None:
        """Tell an account that has just begun to count what was used before."""
        try:
            await self._store.seed(await self._read_used(principal, day))
        except TidegateError as error:
            log.warning(
                "a quota counts from zero for now", extra={"key": principal, "problem": error.message}
            )
            await asyncio.sleep(SEED_RETRY_S)
        finally:
            del self._seeding[principal]
