"""The judge of canaries on seeded simulations: false alarms, speed, promotion, and what is missing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from statistics import median

import numpy as np
import pytest

from services.router.domain.canary import CanaryPolicy, CanaryState, judge, missing, share
from services.router.domain.evidence import Evidence, Tick, upper_bound

pytestmark = pytest.mark.unit

P90, P99 = 1.469, 2.009  # of the baseline's latencies: log-normal, sigma 0.3
POLICY = CanaryPolicy(hold_s=30, min_samples=200)


def latencies(rng: np.random.Generator, count: int, factor: float = 1.0) -> np.ndarray:
    return np.exp(rng.normal(0, 0.3, count)) * factor


def slow(times: np.ndarray, limit: float) -> int:
    return int((times > limit).sum())


def simulate(
    rng: np.random.Generator,
    *,
    errors: float = 0.002,
    factor: float = 1.0,
    step: int = 0,
    policy: CanaryPolicy = POLICY,
    stalls: bool = False,
    rps: int = 100,
) -> tuple[str, int, int]:
    """Return how a rollout ends, after how many seconds, and with how many requests of the canary."""
    state, now, seen, stalled_until = CanaryState(step=step), 0, 0, 0
    while state.phase == "running" and now < 1800:
        now += 1
        canary = int(rng.binomial(rps, share(policy, state) / 100))
        base = rps - canary
        ours, theirs = latencies(rng, canary, factor), latencies(rng, base)
        if stalls and rng.random() < 1 / 120:
            stalled_until = now + 2
        if now < stalled_until:  # half the replicas of both stall together
            ours[: canary // 2] *= 5
            theirs[: base // 2] *= 5
        ticks = {
            "errors": Tick(canary, int(rng.binomial(canary, errors)), base, int(rng.binomial(base, 0.002))),
            "slow": Tick(canary, slow(ours, P90), base, slow(theirs, P90)),
            "very_slow": Tick(canary, slow(ours, P99), base, slow(theirs, P99)),
        }
        seen += canary
        state = judge(policy, state, ticks, canary, float(now)).state
    return state.phase, now, seen


@pytest.mark.parametrize(("stalls", "allowed"), [(False, 0.02), (True, 0.05)])
def test_equal_canaries_are_promoted(stalls: bool, allowed: float) -> None:
    rng, runs = np.random.default_rng(11), 60
    ends = Counter(simulate(rng, stalls=stalls)[0] for _ in range(runs))
    assert ends["rolled_back"] <= allowed * runs
    assert ends["promoted"] >= 0.9 * runs


def test_three_percent_of_errors_at_a_share_of_five_percent() -> None:
    rng = np.random.default_rng(12)
    policy = replace(POLICY, hold_s=inf)
    runs = [simulate(rng, errors=0.032, step=1, policy=policy) for _ in range(60)]
    assert {end for end, _, _ in runs} == {"rolled_back"}
    assert median(seconds for _, seconds, _ in runs) <= 30
    assert median(requests for _, _, requests in runs) <= 150


def test_thirty_percent_more_latency_at_a_share_of_five_percent() -> None:
    rng = np.random.default_rng(13)
    policy = replace(POLICY, hold_s=inf)
    runs = [simulate(rng, factor=1.3, step=1, policy=policy) for _ in range(60)]
    assert {end for end, _, _ in runs} == {"rolled_back"}
    assert median(seconds for _, seconds, _ in runs) <= 20


def test_steps_need_time_and_requests() -> None:
    state = CanaryState(since=100.0)
    assert missing(POLICY, state, 110.0, last=False) == [
        "the step lasts at least 20 s more",
        "200 more requests of the canary are needed",
    ]
    decision = judge(POLICY, replace(state, samples=150), {}, 50, 130.0)
    assert (decision.verdict, decision.state.step, decision.state.samples) == ("advance", 1, 0)


def test_without_evidence_a_canary_pauses_and_says_what_is_missing() -> None:
    policy = replace(POLICY, steps=(50, 100), patience_s=60.0, tolerance=0.0)
    decision = judge(policy, CanaryState(samples=1000), {"errors": Tick(500, 0, 500, 0)}, 500, 61.0)
    assert decision.verdict == "pause"
    assert "errors: no evidence yet that the canary is less than 2 times as bad" in decision.reason
    harm = judge(policy, decision.state, {"errors": Tick(500, 400, 500, 0)}, 500, 62.0)
    assert harm.verdict == "roll_back", "a paused canary is still judged"
    assert share(policy, harm.state) == 0


def test_an_ended_canary_keeps_its_verdict() -> None:
    state = CanaryState(phase="promoted", reason="promoted: no errors")
    assert judge(POLICY, state, {"errors": Tick(9, 9, 9, 0)}, 9, 1.0).state == state
    assert share(POLICY, state) == 100


def test_a_tick_without_requests_on_one_side_adds_nothing() -> None:
    evidence = Evidence(1.25, 2.0)
    assert evidence.add(Tick(0, 0, 100, 5), 1.0) == evidence
    assert evidence.add(Tick(100, 5, 0, 0), 1.0) == evidence


def test_one_block_cannot_decide_alone() -> None:
    tick = Tick(50, 50, 50, 0)
    free, limited = Evidence(1.15, 1.6).add(tick, 1.0), Evidence(1.15, 1.6, 12.0).add(tick, 1.0)
    assert limited.e_worse <= 12 < free.e_worse
    later = limited.add(tick, 11.0)
    assert 12 < later.e_worse <= 144


@pytest.mark.parametrize(("bad", "total"), [(0, 1000), (5, 1000), (50, 100)])
def test_the_upper_bound_holds_and_shrinks(bad: int, total: int) -> None:
    bound = upper_bound(bad, total, 0.05)
    assert bad / total < bound < 1
    assert upper_bound(10 * bad, 10 * total, 0.05) < bound
    assert upper_bound(0, 0, 0.05) == 1.0
