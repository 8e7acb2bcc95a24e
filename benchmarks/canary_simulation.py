"""Simulate rollouts and count the judge's verdicts: ``python -m benchmarks.canary_simulation``.

Each rollout has 100 requests per second with log-normal latencies (sigma 0.3), and 0.2 % of them fail. Only
the code of ``services/router/domain`` runs, so the results depend on the seed and not on the machine. One
process per core runs a part of the rollouts. The cost of one tick is measured last, in this process alone.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import inf
from statistics import median
from typing import Any, Literal

import numpy as np

from benchmarks import options, report
from services.router.domain.canary import SECONDS, CanaryPolicy, CanaryState, judge, share
from services.router.domain.evidence import Tick

P90, P99 = 1.469, 2.009  # of the baseline's latencies
POLICY = CanaryPolicy(hold_s=30, min_samples=200)
ERRORS = 0.002
# Half of the replicas stall for this time, on average once in STALL_EVERY_S. They answer five times slower.
STALL_S, STALL_EVERY_S = 2, 120
LIMIT_S = 1800

Stalls = Literal["none", "together", "apart"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kind of rollout, and what its rollouts must show.

    ``stalls``: replicas of canary and baseline stall at the same times, or each at its own. ``step``: the
    first step; the ``policy`` decides if there is another one. ``rolled_back``: the least and the greatest
    part that is rolled back. ``seconds`` and ``requests``: the greatest medians, of the canary's requests.
    """

    name: str
    errors: float = ERRORS
    factor: float = 1.0
    stalls: Stalls = "none"
    step: int = 0
    policy: CanaryPolicy = POLICY
    rolled_back: tuple[float, float] = (0.0, 1.0)
    seconds: float = inf
    requests: float = inf


HELD = replace(POLICY, hold_s=inf)  # the share stays at the first step's
SCENARIOS = (
    Scenario("equal", rolled_back=(0.0, 0.02)),
    Scenario("equal, replicas stall together", stalls="together", rolled_back=(0.0, 0.05)),
    Scenario("equal, replicas stall apart", stalls="apart", rolled_back=(0.0, 0.05)),
    Scenario(
        "3 % errors at 5 %", errors=ERRORS + 0.03, step=1, policy=HELD, rolled_back=(1.0, 1.0), seconds=30,
        requests=150,
    ),
    Scenario("+30 % latency at 5 %", factor=1.3, step=1, policy=HELD, rolled_back=(1.0, 1.0), seconds=20),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class End:
    """The end of one rollout: its phase, after how many seconds, and with how many canary requests."""

    phase: str
    seconds: int
    requests: int


def simulate(rng: np.random.Generator, scenario: Scenario, rps: int = 100) -> End:
    """Run one rollout until it has ended, at most ``LIMIT_S`` seconds."""
    policy = scenario.policy
    state, now, seen = CanaryState(step=scenario.step), 0, 0
    stalled_until = [0, 0]
    while state.phase == "running" and now < LIMIT_S:
        now += 1
        _stall(rng, scenario.stalls, now, stalled_until)
        canary = int(rng.binomial(rps, share(policy, state) / 100))
        base = rps - canary
        ours, theirs = _latencies(rng, canary) * scenario.factor, _latencies(rng, base)
        for times, until in zip((ours, theirs), stalled_until, strict=True):
            if now < until:
                times[: len(times) // 2] *= 5
        failed = int(rng.binomial(canary, scenario.errors)), int(rng.binomial(base, ERRORS))
        seen += canary
        state = judge(policy, state, ticks_of(ours, theirs, failed), canary, float(now)).state
    return End(state.phase, now, seen)


def ticks_of(ours: np.ndarray, theirs: np.ndarray, failed: tuple[int, int]) -> dict[str, Tick]:
    """Return one second's counts of all metrics: of canary and baseline, from their latencies."""
    canary, base = len(ours), len(theirs)
    ticks = {"errors": Tick(canary, failed[0], base, failed[1])}
    for metric, limit in (("slow", P90), ("very_slow", P99)):
        slow = int((ours > limit).sum()), int((theirs > limit).sum())
        ticks[metric] = Tick(canary, slow[0], base, slow[1])
        if canary and base:
            ticks[metric + SECONDS] = Tick(1, slow[0] / canary, 1, slow[1] / base)
    return ticks


def _latencies(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.exp(rng.normal(0, 0.3, count))


def _stall(rng: np.random.Generator, stalls: Stalls, now: int, until: list[int]) -> None:
    """Let a stall of canary and baseline begin, if its time has come."""
    if stalls == "none":
        return
    for side in (0, 1):
        if stalls == "together" and side:
            until[1] = until[0]
        elif rng.random() < 1 / STALL_EVERY_S:
            until[side] = now + STALL_S


def run(scenario: Scenario, rollouts: int, seed: int) -> list[End]:
    """Run rollouts of one scenario."""
    rng = np.random.default_rng(seed)
    return [simulate(rng, scenario) for _ in range(rollouts)]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. ``seconds`` and ``requests`` are medians."""

    name: str
    rollouts: int
    ends: dict[str, int]
    rolled_back: float
    seconds: float
    requests: float
    right: bool

    def line(self) -> str:
        """Return the line for the screen."""
        return (
            f"{'PASS' if self.right else 'MISS'}  {self.name:<32} {self.rollouts:>6} "
            f"{self.rolled_back:>11.2%} {self.ends.get('promoted', 0) / self.rollouts:>9.2%} "
            f"{self.seconds:>8.0f} s {self.requests:>12.0f}"
        )


def row(scenario: Scenario, ends: Sequence[End]) -> Row:
    """Return the summary of a scenario's rollouts."""
    counts = Counter(end.phase for end in ends)
    part = counts["rolled_back"] / len(ends)
    seconds, requests = median(end.seconds for end in ends), median(end.requests for end in ends)
    least, most = scenario.rolled_back
    right = least <= part <= most and seconds <= scenario.seconds and requests <= scenario.requests
    return Row(scenario.name, len(ends), dict(counts), part, seconds, requests, right)


def tick_us(ticks: int = 5000) -> float:
    """Return the mean CPU time of one call of the judge in microseconds, with all metrics."""
    rng = np.random.default_rng(1)
    policy = replace(HELD, steps=(5, 100))
    others = {"stalled_seconds": Tick(1, 0, 3, 0), "quality": Tick(5, 1, 95, 20)}
    seen = []
    for _ in range(200):
        failed = 0, int(rng.random() < 0.2)
        seen.append(ticks_of(_latencies(rng, 5), _latencies(rng, 95), failed) | others)
    state, began = CanaryState(), time.process_time()
    for at in range(ticks):
        state = judge(policy, state, seen[at % len(seen)], 5, float(at)).state
    return (time.process_time() - began) / ticks * 1e6


def main() -> int:
    """Run, print the table, write canary_simulation.json. Return 1 if a scenario misses what it must show."""
    chosen = _arguments()
    machine = report.machine()
    print(
        f"{'':6}{'canary':<32} {'runs':>6} {'rolled back':>11} {'promoted':>9} "
        f"{'median':>10} {'its requests':>12}"
    )
    rows = []
    with ProcessPoolExecutor() as pool:
        cores = os.cpu_count() or 1
        parts = 4 * cores
        each = [chosen.rollouts // parts + (at < chosen.rollouts % parts) for at in range(parts)]
        for number, scenario in enumerate(SCENARIOS):
            seeds = [chosen.seed * 10_000 + number * 100 + at for at in range(parts)]
            found = pool.map(run, [scenario] * parts, each, seeds)
            rows.append(row(scenario, [end for ends in found for end in ends]))
            print(rows[-1].line(), flush=True)
    cost = tick_us()
    print(f"One tick of the judge takes {cost:.0f} microseconds.")
    print(report.machine_line(machine))
    chosen.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"machine": machine, "tick_us": cost, "rows": [asdict(each) for each in rows]}
    report.write_json(chosen.out / "canary_simulation.json", document)
    return 0 if all(each.right for each in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--rollouts", type=int, default=1000, help="of each scenario (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
