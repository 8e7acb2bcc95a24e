"""The judge of canaries on seeded simulations: false alarms, speed, promotion, and what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.canary_simulation import HELD, POLICY, SCENARIOS, Scenario, row, run
from services.router.domain.canary import CanaryState, judge, missing, share
from services.router.domain.evidence import Evidence, Tick, upper_bound

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("scenario", SCENARIOS[:3], ids=lambda each: each.name)
def test_equal_canaries_are_promoted(scenario: Scenario) -> None:
    found = row(scenario, run(scenario, 30, seed=11))
    assert found.right, found
    assert found.ends["promoted"] >= 27


@pytest.mark.parametrize("scenario", SCENARIOS[3:], ids=lambda each: each.name)
def test_harmful_canaries_are_rolled_back_soon(scenario: Scenario) -> None:
    found = row(scenario, run(scenario, 60, seed=12))
    assert found.right, found


def test_slow_requests_of_few_seconds_are_no_harm() -> None:
    state = CanaryState(step=3)
    for second in range(60):
        stalled = second in (3, 23, 43)  # half of the canary's requests, and none of the baseline's
        slow = 25 if stalled else 4
        ticks = {"slow": Tick(50, slow, 50, 5), "slow_seconds": Tick(1, slow / 50, 1, 0.1)}
        without = judge(HELD, state, ticks, 50, float(second))
        state = without.state
        assert state.phase == "running", second
    assert state.evidence["slow_seconds"].e_worse < 1
    while state.phase == "running" and second < 300:
        second += 1
        ticks = {"slow": Tick(50, 17, 50, 5), "slow_seconds": Tick(1, 0.34, 1, 0.1)}
        state = judge(HELD, state, ticks, 50, float(second)).state
    assert state.phase == "rolled_back"
    assert state.reason.startswith("slow: ")


def test_seconds_alone_can_roll_back() -> None:
    """A canary with few requests that stalls in every fifth second."""
    state, second = CanaryState(step=1), 0
    while state.phase == "running" and second < 1800:
        stalled = second % 5 == 0
        ticks = {"slow": Tick(1, 0, 9, 0), "slow_seconds": Tick(1, float(stalled), 1, 0.01)}
        state, second = judge(HELD, state, ticks, 1, float(second)).state, second + 1
    assert (state.phase, state.reason.split(":")[0]) == ("rolled_back", "slow_seconds")
    assert "canary seconds, against" in state.reason


def test_a_promotion_needs_no_evidence_of_seconds() -> None:
    evidence = {"slow_seconds": Evidence(1.15, 1.6, 12.0)}
    assert not missing(POLICY, CanaryState(samples=10_000, evidence=evidence), 1000.0, last=True)


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
    assert decision.reason.startswith("not enough evidence after")  # the phase says "paused" already
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


def test_one_tick_cannot_do_much() -> None:
    tick = Tick(50, 50, 50, 0)
    assert Evidence(1.15, 1.6, 12.0, 3.0).add(tick, 1.0).e_worse == pytest.approx(3)


def test_reaching_a_limit_is_having_its_value() -> None:
    evidence = Evidence(1.25, 2.0)
    for second in range(30):
        evidence = evidence.add(Tick(50, 2, 50, 1), float(second))
        for limit in (1.0, evidence.e_worse * 0.99, evidence.e_worse * 1.01):
            assert evidence.reaches(limit) is (evidence.e_worse >= limit)


@pytest.mark.parametrize(("bad", "total"), [(0, 1000), (5, 1000), (50, 100)])
def test_the_upper_bound_holds_and_shrinks(bad: int, total: int) -> None:
    bound = upper_bound(bad, total, 0.05)
    assert bad / total < bound < 1
    assert upper_bound(10 * bad, 10 * total, 0.05) < bound
    assert upper_bound(0, 0, 0.05) == 1.0
    assert upper_bound(total, total, 0.05) == 1.0
