"""Charge callers for tokens: an estimate at admission, then the engine's count at the end.

Each charge waits for the store. This wait is short compared with a request, which takes seconds. One call to
the store charges all accounts of the caller; all gateway processes share these accounts. At the end of the
request, the charge is corrected in the background. While the store is down, each process applies its own
share of each limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from services.gateway.application.access import LIMITED, label_of
from services.gateway.domain.llm.token_charge import STEP, PromptRatio, charge
from services.gateway.domain.llm.token_headers import Left, TokenAccount, tokens_left
from services.gateway.domain.llm.token_refusals import check_fits, too_many
from services.gateway.domain.llm.token_window import TokenBalance, TokenWindow
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.access import Key, Principal, TokenAllowance
from tidegate.kernel.store import StoreUnavailable

log = telemetry.logger(__name__)

SLOW_S = 0.5  # a store that needs longer for a call is treated as down
RETRY_S = 0.5
# While the store is down, a process counts the charges of at most this many accounts. When it reaches this
# number, it deletes all counts, so that memory stays limited.
MOST_WINDOWS = 10_000


class Store(Protocol):
    """The store of the token accounts, which all gateway processes share."""

    async def charge(
        self, accounts: Sequence[TokenAccount], tokens: int
    ) -> tuple[int, tuple[TokenBalance, ...]]:
        """Charge all accounts or none. Return the time of the charge, and the balances before it.

        The time is in whole seconds of Unix time.
        """

    async def settle(self, ids: Sequence[str], at: int, difference: int, *, late: bool) -> None:
        """Correct a charge by ``difference`` tokens.

        If the charge is more than a minute old, the limit per minute ignores the difference. But with
        ``late``, a difference above 0 counts in the present minute.
        """


@dataclass(frozen=True, slots=True)
class Charge:
    """A charge that can be corrected later. ``at``: its time, in whole seconds of Unix time.

    ``late``: see :meth:`Store.settle`. It is False if the store was down and this process charged its own
    share of the limit.
    """

    ids: tuple[str, ...]
    at: int
    late: bool


class Settlement(NamedTuple):
    """A correction of a charge, while it is sent to the store."""

    made: Charge
    difference: int
    task: asyncio.Task[None]


class Reservation:
    """The tokens that one request was charged.

    The calling code must call :meth:`settle` at the end of the request.
    """

    __slots__ = ("_accounts", "_balances", "_charge", "_limits", "_open", "charged")

    def __init__(
        self,
        limits: TokenLimits,
        accounts: Sequence[TokenAccount],
        balances: Sequence[TokenBalance],
        made: Charge,
        charged: int,
    ) -> None:
        self._limits = limits
        self._accounts = accounts
        self._balances = balances
        self._charge = made
        self._open = True
        self.charged = charged

    def states(self) -> list[Left]:
        """Return the state of the caller's limits after this charge, for the response's headers."""
        return _states(self._accounts, self._balances, self.charged)

    def used(self, tokens: int) -> None:
        """Increase the charge if the request has used more tokens than it was charged.

        ``tokens``: the number of tokens of the prompt, and of the answer so far.
        """
        if self._open and tokens > self.charged:
            self._settle(tokens + STEP)

    def settle(self, tokens: int) -> None:
        """Correct the charge to ``tokens``, the engine's final count. Later calls do nothing."""
        if self._open:
            self._settle(tokens)
            self._open = False

    def _settle(self, tokens: int) -> None:
        self._limits.correct(self._charge, tokens - self.charged)
        self.charged = tokens


class TokenLimits:
    """Apply the token limits of callers. ``processes`` returns how many processes share the accounts."""

    def __init__(self, store: Store, processes: Callable[[], int]) -> None:
        self._store = store
        self._processes = processes
        self._keys: Mapping[str, Key] = {}
        self._jwt_callers: dict[str, TokenAllowance] = {}
        self._windows: dict[str, TokenWindow] = {}
        self._pending: dict[Charge, int] = {}
        self._settling: Settlement | None = None
        self._late: set[asyncio.Task[tuple[int, tuple[TokenBalance, ...]]]] = set()
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._retry_at = 0.0
        self._away = False
        self.ratio = PromptRatio()

    def replace(self, keys: Mapping[str, Key]) -> None:
        """Replace the limits of all keys. ``keys``: the keys by id."""
        self._keys = {
            id_: key for id_, key in keys.items() if key.endpoint_tokens or not key.tokens.unlimited
        }

    def set(self, principal: str, allowance: TokenAllowance | None) -> None:
        """Set the token limits of one caller with a JWT. None: it has no limits."""
        if allowance is None:
            self._jwt_callers.pop(principal, None)
        else:
            self._jwt_callers[principal] = allowance

    def start(self) -> None:
        """Start correcting charges in the store, in the background."""
        self._task = asyncio.create_task(self._run(), name="token limits")

    async def stop(self) -> None:
        """Stop the background task, and send the remaining corrections to the store."""
        await tasks.end(self._task)
        if self._late:
            await asyncio.wait(self._late, timeout=SLOW_S)
        with contextlib.suppress(TimeoutError, StoreUnavailable):
            async with asyncio.timeout(SLOW_S):
                await self._flush()
        await tasks.end(*self._late, self._settling.task if self._settling else None)

    def accounts(self, principal: Principal, endpoint: str) -> list[TokenAccount]:
        """Return a caller's accounts for an endpoint; empty if the caller has no token limit there."""
        key = self._keys.get(principal.id)
        if key is None:
            allowance = self._jwt_callers.get(principal.id)
            return [] if allowance is None else [TokenAccount(principal.id, "", allowance)]
        limits = (("", key.tokens), (endpoint, key.endpoint_tokens.get(endpoint, TokenAllowance())))
        return [TokenAccount(key.principal.id, name, each) for name, each in limits if not each.unlimited]

    async def reserve(
        self, principal: Principal, endpoint: str, prompt: int, answer: int, *, stated: bool
    ) -> Reservation | None:
        """Charge a request; return None if the caller has no token limit at this endpoint.

        ``prompt``, ``answer``: the estimated tokens. ``stated``: True if the request sets a limit for its
        answer. Raise TooMany if a limit is reached, BadRequest if the request is larger than a limit.
        """
        accounts = self.accounts(principal, endpoint)
        if not accounts:
            return None
        prompt = self.ratio.prompt(endpoint, prompt, principal.id)
        limits = {each.id: each.limit for each in accounts}
        tokens = charge(prompt, answer, stated=stated, limits=limits)
        check_fits(accounts, prompt, tokens)
        made, balances = await self._charge(accounts, tokens)
        for account, balance in zip(accounts, balances, strict=True):
            if balance.refused:
                LIMITED.labels(label_of(account.principal), f"tokens_{balance.refused}").inc()
                raise too_many(account, balance, _states(accounts, balances, 0))
        return Reservation(self, accounts, balances, made, tokens)

    def correct(self, made: Charge, difference: int) -> None:
        """Correct a charge by ``difference`` tokens, in the background."""
        if not difference:
            return
        if not made.late:
            for id_ in made.ids:
                self._window(id_).settle(made.at, difference, time.time())
        self._pending[made] = self._pending.get(made, 0) + difference
        self._woken.set()

    async def _charge(
        self, accounts: Sequence[TokenAccount], tokens: int
    ) -> tuple[Charge, tuple[TokenBalance, ...]]:
        ids = tuple(each.id for each in accounts)
        if time.monotonic() >= self._retry_at:
            charging = asyncio.create_task(self._charge_store(accounts, tokens))
            try:
                async with asyncio.timeout(SLOW_S):
                    at, balances = await asyncio.shield(charging)
            except BaseException as error:
                self._take_back(charging, ids, tokens)
                if not isinstance(error, StoreUnavailable | TimeoutError):
                    raise
                self._note_away(str(error) or f"no answer within {SLOW_S} s")
            else:
                self._note_back()
                return Charge(ids, at, late=True), balances
        return self._charge_own_share(accounts, ids, tokens)

    async def _charge_store(
        self, accounts: Sequence[TokenAccount], tokens: int
    ) -> tuple[int, tuple[TokenBalance, ...]]:
        return await self._store.charge(accounts, tokens)

    def _take_back(
        self, charging: asyncio.Task[tuple[int, tuple[TokenBalance, ...]]], ids: tuple[str, ...], tokens: int
    ) -> None:
        """Undo a charge that the store may still make although the request no longer waits for it."""

        def on_done(_: object) -> None:
            self._late.discard(charging)
            if charging.cancelled() or charging.exception() is not None:
                return
            at, balances = charging.result()
            if not any(each.refused for each in balances):
                self.correct(Charge(ids, at, late=True), -tokens)

        self._late.add(charging)
        charging.add_done_callback(on_done)

    def _charge_own_share(
        self, accounts: Sequence[TokenAccount], ids: tuple[str, ...], tokens: int
    ) -> tuple[Charge, tuple[TokenBalance, ...]]:
        now, share = time.time(), 1 / max(1, self._processes())
        if len(self._windows) >= MOST_WINDOWS:
            self._windows.clear()
        balances = tuple(
            self._window(each.id).balance(tokens, _shared(each.limit, share), now) for each in accounts
        )
        made = Charge(ids, int(now), late=False)
        if not any(each.refused for each in balances):
            for id_ in ids:
                self._window(id_).charge(tokens, now)
            # Send this charge to the store when the store answers again. The limit per minute may then ignore
            # the charge, but the limit per day counts it.
            self._pending[made] = self._pending.get(made, 0) + tokens
        return made, balances

    def _window(self, id_: str) -> TokenWindow:
        return self._windows.setdefault(id_, TokenWindow())

    def _note_away(self, problem: str) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if not self._away:
            self._away = True
            log.warning(
                "the store does not answer; this process applies its share of every token limit",
                extra={"problem": problem},
            )

    def _note_back(self) -> None:
        if self._away:
            self._away = False
            self._windows.clear()
            self._woken.set()
            log.info("the store answers again; token limits apply to all processes together")

    async def _run(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                await self._flush()
            except (StoreUnavailable, TimeoutError) as error:
                self._note_away(str(error) or f"no answer within {SLOW_S} s")
                await asyncio.sleep(RETRY_S)
                self._woken.set()
            except Exception:
                log.exception("the usage of tokens could not be reported to the store")
                await asyncio.sleep(RETRY_S)

    async def _flush(self) -> None:
        """Send all corrections to the store. If a correction fails, raise the error.

        The next call sends the failed correction again. If the store is slow, raise TimeoutError. The next
        call then waits for the same correction and does not send it again, because the store would apply it
        twice.
        """
        while self._pending:
            if self._settling is None:
                made, difference = next(iter(self._pending.items()))
                task = asyncio.create_task(self._settle(made, difference))
                self._settling = Settlement(made, difference, task)
            made, difference, task = self._settling
            await asyncio.wait({task}, timeout=SLOW_S)
            if not task.done():
                raise TimeoutError
            self._settling = None
            task.result()
            left = self._pending.pop(made) - difference
            if left:
                self._pending[made] = left

    async def _settle(self, made: Charge, difference: int) -> None:
        await self._store.settle(made.ids, made.at, difference, late=made.late)


def _shared(limit: TokenAllowance, share: float) -> TokenAllowance:
    """Return one process's share of a limit."""

    def part(most: int | None) -> int | None:
        return None if most is None else max(1, int(most * share))

    return TokenAllowance(part(limit.minute), part(limit.day))


def _states(accounts: Sequence[TokenAccount], balances: Sequence[TokenBalance], charged: int) -> list[Left]:
    return [
        state
        for account, balance in zip(accounts, balances, strict=True)
        for state in tokens_left(account, balance, charged)
    ]
