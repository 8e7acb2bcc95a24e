"""Limits of tokens: what a request is charged, what is returned, and what a caller at a limit gets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.application.feedback import FeedbackTags
from services.gateway.application.jobs.submission import JobRequest, JobSubmitter, SubmittedJob
from services.gateway.application.llm.accounting import LlmAccounting
from services.gateway.application.llm.core import LlmCall, LlmCore
from services.gateway.application.llm.token_limits import TokenLimits
from services.gateway.domain.feedback_ids import FeedbackIds
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.llm import token_headers
from services.gateway.domain.llm.estimate import TokenEstimate
from services.gateway.domain.llm.token_charge import ASSUMED_ANSWER, PromptRatio, charge
from services.gateway.domain.llm.token_headers import TokenAccount
from services.gateway.domain.llm.token_window import DAY_S, WINDOW_S, TokenBalance, TokenWindow
from services.gateway.domain.llm_jobs import check_body
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import BadRequest, Overloaded, TooMany
from tidegate.kernel.protocol.access import ANONYMOUS, Key, Principal, TokenAllowance
from tidegate.kernel.protocol.presence import GatewayLoad
from tidegate.kernel.store import StoreUnavailable

pytestmark = pytest.mark.unit

NOW = 1_800_000_000.0  # a whole second, in the middle of a day
ROBOT = Principal("ab12", "robot", frozenset({"infer"}))


class SharedAccounts:
    """The accounts of the store, in memory, with the same algorithm. ``away``: it does not answer."""

    def __init__(self) -> None:
        self.windows: dict[str, TokenWindow] = {}
        self.away = False
        self.now = NOW

    async def charge(self, accounts, tokens):
        self._check()
        windows = [self.windows.setdefault(each.id, TokenWindow()) for each in accounts]
        balances = [w.balance(tokens, a.limit, self.now) for w, a in zip(windows, accounts, strict=True)]
        if not any(each.refused for each in balances):
            for window in windows:
                window.charge(tokens, self.now)
        return int(self.now), tuple(balances)

    async def settle(self, ids, at, difference, *, late):
        self._check()
        for each in ids:
            window = self.windows[each]
            if late or at + 1 + WINDOW_S > self.now:
                window.settle(at, difference, self.now)
            else:
                window.day_used += difference

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("The store does not answer.")


@pytest.fixture
def store() -> SharedAccounts:
    return SharedAccounts()


@pytest.fixture
async def limits(store):
    found = TokenLimits(store, lambda: 2)
    found.start()
    yield found
    await found.stop()


def key(minute: int | None = None, day: int | None = None, **endpoints: TokenAllowance) -> dict[str, Key]:
    return {"ab12": Key(ROBOT, "", tokens=TokenAllowance(minute, day), endpoint_tokens=endpoints)}


async def settled(limits: TokenLimits) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while limits._pending:
            await asyncio.sleep(0.001)


async def test_an_estimate_is_charged_and_the_rest_is_returned(limits, store):
    limits.replace(key(1000))
    made = await limits.reserve(ROBOT, "chat", 100, 200, stated=True)
    assert store.windows["ab12"].charges == {int(NOW): 300}
    made.settle(120)
    made.settle(7)
    await settled(limits)
    assert store.windows["ab12"].charges == {int(NOW): 120}, "only the first end counts"


@pytest.mark.parametrize(
    ("answers", "usage", "left", "expected"),
    [
        (1, (90, 20, 0), False, 110),
        (1, (0, 0, 0), False, 300),  # no usage, but an answer
        (1, (0, 0, 0), True, 100),
        (0, (0, 0, 0), False, 0),  # refused
    ],
)
async def test_an_answer_without_usage_keeps_its_charge(limits, store, answers, usage, left, expected):
    limits.replace(key(1000))
    accounting = LlmAccounting(cast(Any, SimpleNamespace(admit=lambda *_: None)), limits)
    call = LlmCall("chat", "/v1/completions", {"max_tokens": 200}, principal=ROBOT)
    call.estimate = TokenEstimate(100, 200)
    account = await accounting.open(call, "chat", GatewayLoad())
    call.usage, call.cost.answers, account.left = usage, answers, left
    call.cost.begin()
    account.close()
    await settled(limits)
    assert sum(store.windows["ab12"].charges.values()) == expected


@pytest.mark.parametrize(
    ("usage", "expected"),
    [(None, (100, 3)), ((90, 20, 0), (90, 20))],
)
async def test_a_stream_whose_usage_was_not_told_is_charged_to_the_budget(limits, usage, expected):
    """Upstreams tell it at the end, and a caller may leave before."""
    charged: list[Any] = []
    grant = SimpleNamespace(streamed=lambda cost, _: charged.append((cost.tokens_in, cost.tokens_out)))
    accounting = LlmAccounting(cast(Any, SimpleNamespace(admit=lambda *_: grant)), limits)
    call = LlmCall("chat", "/v1/completions", {"max_tokens": 200}, principal=ROBOT)
    call.estimate = TokenEstimate(100, 200)
    account = await accounting.open(call, "chat", GatewayLoad())
    account.answered(usage, 3, 0.1)
    if usage is not None:
        call.usage = usage
        call.cost.tokens_in, call.cost.tokens_out, _ = usage
    account.close()
    assert charged == [expected]


def test_no_request_runs_in_the_background_of_a_provider():
    with pytest.raises(BadRequest, match="respond-async"):
        check_body({"model": "chat", "input": "x", "background": True})


async def test_a_job_is_charged_when_it_is_accepted(limits, store, monkeypatch):
    limits.replace(key(1000))
    entry: Any = SimpleNamespace(name="chat", llm=SimpleNamespace(context=None))
    llm = LlmCore(SimpleNamespace(), LlmAccounting(SimpleNamespace(), limits))  # type: ignore[arg-type]
    monkeypatch.setattr(llm, "pick", lambda model, origin: (entry, entry))
    other: Any = SimpleNamespace(store=None, feedback=FeedbackTags(FeedbackIds("")))
    submitter = JobSubmitter(other, llm, other, other, other, ttl_s=1, retention_s=1, max_queued=1)
    outcomes: list[Any] = [SubmittedJob(other, True, 0), SubmittedJob(other, False, 0), Overloaded("full")]

    async def submit(request: JobRequest) -> SubmittedJob:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(submitter, "_submit", submit)
    body = {"model": "chat", "prompt": "a" * 400, "max_tokens": 300}
    request = submitter.check_llm("/v1/completions", body, JobOptions(), ROBOT)
    for again in range(3):
        with contextlib.suppress(Overloaded):
            await submitter.submit(request)
        await settled(limits)
        assert store.windows["ab12"].charges == {int(NOW): 400}, f"submission {again} counts once"
    body["max_tokens"] = 600
    request = submitter.check_llm("/v1/completions", body, JobOptions(), ROBOT)
    with pytest.raises(TooMany):
        await submitter.submit(request)


async def test_an_answer_that_grows_beyond_its_charge_is_charged_while_it_grows(limits, store):
    limits.replace(key(1000))
    made = await limits.reserve(ROBOT, "chat", 10, 5000, stated=False)
    assert made.charged == 10 + ASSUMED_ANSWER
    made.used(made.charged)
    made.used(400)
    await settled(limits)
    assert store.windows["ab12"].day_used > 400
    made.settle(401)
    await settled(limits)
    assert store.windows["ab12"].day_used == 401


async def test_a_caller_at_its_limit(limits, store):
    limits.replace(key(300))
    await limits.reserve(ROBOT, "chat", 100, 100, stated=True)
    store.now += 10
    with pytest.raises(TooMany) as caught:
        await limits.reserve(ROBOT, "chat", 100, 100, stated=True)
    error = caught.value
    assert (error.reason, error.retry_after_s) == ("token_rate_limited", WINDOW_S + 1 - 10)
    assert error.headers["x-ratelimit-limit-tokens"] == "300"
    assert error.headers["x-ratelimit-remaining-tokens"] == "100"
    assert error.headers["x-ratelimit-reset-tokens"] == "51s"
    assert error.headers["ratelimit-policy"] == '"tokens-minute";q=300;w=60;qu="tokens"'
    assert await limits.reserve(ROBOT, "chat", 50, 50, stated=True), "a request that fits is admitted"


async def test_the_day_counts_beside_the_minute(limits, store):
    limits.replace(key(300, 500))
    await limits.reserve(ROBOT, "chat", 100, 200, stated=True)
    store.now += WINDOW_S + 1
    with pytest.raises(TooMany) as caught:
        await limits.reserve(ROBOT, "chat", 100, 200, stated=True)
    assert caught.value.reason == "token_quota_exhausted"
    assert caught.value.retry_after_s == pytest.approx(DAY_S - store.now % DAY_S)
    store.now += DAY_S
    assert await limits.reserve(ROBOT, "chat", 100, 200, stated=True)


async def test_an_endpoint_has_a_limit_of_its_own(limits, store):
    limits.replace(key(1000, chat=TokenAllowance(minute=100)))
    made = await limits.reserve(ROBOT, "chat", 40, 40, stated=True)
    assert [each.name for each in made.states()] == ["tokens-minute", "tokens-minute-chat"]
    with pytest.raises(TooMany, match="at 'chat'"):
        await limits.reserve(ROBOT, "chat", 40, 40, stated=True)
    assert store.windows["ab12"].day_used == 80, "a request that one account refuses is charged to none"
    assert await limits.reserve(ROBOT, "tags", 400, 400, stated=True)


@pytest.mark.parametrize(("prompt", "answer", "hint"), [(40, 100, "max_tokens to 60"), (101, 5, "shorten")])
async def test_a_request_that_can_never_fit(limits, prompt, answer, hint):
    limits.replace(key(100))
    with pytest.raises(BadRequest, match=hint) as caught:
        await limits.reserve(ROBOT, "chat", prompt, answer, stated=True)
    assert caught.value.reason == "request_above_token_limit"


async def test_an_answer_without_a_stated_limit_never_exceeds_the_callers(limits):
    limits.replace(key(100))
    assert (await limits.reserve(ROBOT, "chat", 40, 2048, stated=False)).charged == 100


async def test_callers_without_a_limit(limits, store):
    limits.replace(key())
    for principal in (ROBOT, ANONYMOUS):
        assert await limits.reserve(principal, "chat", 10**9, 10**9, stated=True) is None
    assert not store.windows


async def test_a_process_without_the_store_applies_its_share(limits, store):
    limits.replace(key(1000))
    store.away = True
    first = await limits.reserve(ROBOT, "chat", 100, 300, stated=True)
    with pytest.raises(TooMany):
        await limits.reserve(ROBOT, "chat", 100, 300, stated=True)
    first.settle(150)
    await limits.reserve(ROBOT, "chat", 100, 200, stated=True)
    store.away, store.now = False, time.time()
    limits._retry_at = 0.0
    store.windows["ab12"] = TokenWindow(day=int(store.now // DAY_S))
    await limits.reserve(ROBOT, "chat", 5, 5, stated=True)
    await settled(limits)
    assert store.windows["ab12"].day_used == 150 + 300 + 10, "the account gets the tokens of the outage"


async def test_a_settlement_waits_for_the_store(limits, store):
    limits.replace(key(1000))
    made = await limits.reserve(ROBOT, "chat", 100, 300, stated=True)
    store.away = True
    made.settle(100)
    await asyncio.sleep(0.01)
    assert store.windows["ab12"].day_used == 400
    store.away = False
    await settled(limits)
    assert store.windows["ab12"].day_used == 100


class SlowAccounts(SharedAccounts):
    """A store that does what it is told at once, and answers after ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.settlements = 0

    async def charge(self, accounts, tokens):
        found = await super().charge(accounts, tokens)
        await self.go.wait()
        return found

    async def settle(self, ids, at, difference, *, late):
        self.settlements += 1
        await super().settle(ids, at, difference, late=late)
        await self.go.wait()

    def charged(self) -> int:
        return sum(sum(window.charges.values()) for window in self.windows.values())


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_caller_that_leaves_during_its_charge_gets_its_tokens_back():
    store = SlowAccounts()
    limits = TokenLimits(store, lambda: 1)
    limits.start()
    limits.replace(key(1000))
    reserving = asyncio.create_task(limits.reserve(ROBOT, "chat", 100, 200, stated=True))
    await until(store.charged)
    reserving.cancel()
    await asyncio.wait({reserving})
    store.go.set()
    await until(lambda: store.charged() == 0)
    assert reserving.cancelled()
    await limits.stop()


async def test_a_slow_store_settles_each_difference_once(monkeypatch):
    store = SlowAccounts()
    limits = TokenLimits(store, lambda: 1)
    limits.start()
    limits.replace(key(1000))
    store.go.set()
    reservation = await limits.reserve(ROBOT, "chat", 100, 200, stated=True)
    assert reservation is not None
    store.go.clear()
    for name in ("SLOW_S", "RETRY_S"):
        monkeypatch.setattr(f"services.gateway.application.llm.token_limits.{name}", 0.001)
    waits: list[str] = []
    monkeypatch.setattr(limits, "_note_away", waits.append)
    reservation.settle(120)
    await until(lambda: len(waits) > 3)
    store.go.set()
    await settled(limits)
    assert (store.settlements, store.charged()) == (1, 120)
    await limits.stop()


def test_a_window_slides():
    window, limit = TokenWindow(), TokenAllowance(minute=100)
    window.charge(60, NOW)
    window.charge(40, NOW + 30)
    assert window.balance(50, limit, NOW + 40).wait_ms == pytest.approx((WINDOW_S + 1 - 40) * 1e3)
    assert window.balance(70, limit, NOW + 40).wait_ms == pytest.approx((WINDOW_S + 31 - 40) * 1e3)
    assert window.balance(60, limit, NOW + WINDOW_S + 1).refused == ""
    assert window.balance(61, limit, NOW + WINDOW_S + 1).refused == "minute"


def test_late_settlements():
    window = TokenWindow()
    at = window.charge(60, NOW)
    window.settle(at, -20, NOW + WINDOW_S + 5)
    assert (sum(window.charges.values()), window.day_used) == (0, 40), "an expired rest is not returned"
    window.settle(at, 30, NOW + WINDOW_S + 5)
    assert window.charges == {int(NOW) + WINDOW_S + 5: 30}, "tokens beyond the charge count now"


@pytest.mark.parametrize("seed", range(5))
def test_no_minute_has_more_than_the_limit_and_none_of_it_is_wasted(seed):
    """Drive two processes' callers for five minutes. Some streams are cut off, some pass their estimate."""
    draw, window, limit = random.Random(seed), TokenWindow(), TokenAllowance(minute=1000)
    now, used = NOW, []
    running: deque[tuple[float, int, int, int]] = deque()
    while now < NOW + 300:
        now += draw.expovariate(40.0)
        while running and running[0][0] <= now:
            _, at, charged, real = running.popleft()
            window.settle(at, real - charged, now)
            used.append((at, real))
        estimated = draw.randint(8, 24)
        if not window.balance(estimated, limit, now).refused:
            cut = draw.random() < 0.3
            real = draw.randint(4, estimated) if cut else estimated
            running.append((now + 0.5, window.charge(estimated, now), estimated, real))
    used += [(at, real) for _, at, _, real in running]
    total = sum(real for at, real in used if at < NOW + 300)
    assert 0.98 * 5000 <= total <= 1.02 * 5000, total
    for start in range(int(NOW), int(NOW) + 240):
        assert sum(real for at, real in used if start <= at < start + 60) <= 1000


def test_the_charge_of_a_request():
    limits = {"a": TokenAllowance(100, 1000), "b": TokenAllowance(None, 70)}
    assert charge(40, 500, stated=True, limits=limits) == 540
    assert charge(40, 500, stated=False, limits=limits) == 70
    assert charge(80, 500, stated=False, limits=limits) == 80, "the prompt alone is too long"
    assert charge(40, 500, stated=False, limits={}) == 40 + ASSUMED_ANSWER


def test_the_ratio_of_real_to_estimated_prompts():
    ratio = PromptRatio()
    assert ratio.prompt("chat", 100) == 100
    ratio.learn("chat", 100, 150)
    assert ratio.prompt("chat", 100) == 165
    ratio.learn("chat", 100, 50)
    assert 110 < ratio.prompt("chat", 100) < 165, "a lower ratio counts slowly"
    ratio.learn("chat", 100, 200)
    assert ratio.prompt("chat", 100) == pytest.approx(220, abs=1), "a higher one at once"
    ratio.learn("chat", 0, 10)
    ratio.learn("chat", 10, 0)
    assert ratio.prompt("chat", 100) == pytest.approx(220, abs=1)
    assert ratio.prompt("tags", 7) == 7


def test_unusual_prompts_of_one_caller_do_not_refuse_those_of_others():
    ratio = PromptRatio()
    ratio.learn("chat", 100, 100, "victim")
    for _ in range(3):
        ratio.learn("chat", 1, 1000, "attacker")
    assert ratio.prompt("chat", 100, "attacker") == pytest.approx(1100, abs=1)
    assert ratio.prompt("chat", 100, "victim") == pytest.approx(110, abs=1)
    assert ratio.prompt("chat", 100, "newcomer") == pytest.approx(220, abs=1)


def test_headers():
    account = TokenAccount("ab12", "chat", TokenAllowance(100, 1000))
    states = token_headers.tokens_left(account, TokenBalance(30, 400, 0, 4200, 7_200_000), 20)
    assert dict(token_headers.rate_limit(states)) == {
        b"ratelimit-policy": b'"tokens-minute-chat";q=100;w=60;qu="tokens", '
        b'"tokens-day-chat";q=1000;w=86400;qu="tokens"',
        b"ratelimit": b'"tokens-minute-chat";r=50;t=61, "tokens-day-chat";r=580;t=7200',
    }
    requests = token_headers.Left("rate", 60, 59, 0.85)
    assert dict(token_headers.openai(requests, states)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"850ms",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"50",
        b"x-ratelimit-reset-tokens": b"1m1s",
    }
    assert token_headers.joined([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]) == [(b"a", b"1, 3"), (b"b", b"2")]
    assert [token_headers.duration(s) for s in (0, 7, 360, 7384.2)] == ["0ms", "7s", "6m0s", "2h3m5s"]
