"""Measure requests with and without shadow traffic: ``python -m benchmarks.shadow``.

A model that sleeps serves an endpoint. Another version of it is the shadow, on a replica of its own. Its
capacity is measured in a closed loop. Then requests arrive as a Poisson process at 70 % of the capacity, in
pairs of rounds: one without a shadow and one with a shadow that gets a copy of every request. All rounds have
the same times of arrival, so that a queue forms at the same requests. The medians of the rounds count.

The model sleeps, as on an accelerator, so copies and requests share the cores of gateway, broker and worker,
but not those of the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import options, report, session, sleeper, stack
from benchmarks.client import Client
from benchmarks.open_loop import failures, offer, percentile

NAME, SHADOW = "sleep", "sleep-v2"
MODEL = stack.EXAMPLES / "sleep" / "model.py"
SEED = 17
LOAD = 0.7
BAR = 1.05
# The share of the requests to copy that must have been copied.
COPIED = 0.95
CALLERS = 16
# Gateways get a changed shadow within this time.
SETTLE_S = 3.0
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the callers' times in ms, failed requests by reason, and copies (0 without a shadow)."""

    shadow: bool
    requests: int
    p50_ms: float
    p99_ms: float
    failed: dict[str, int]
    copied: int = 0
    answered: int = 0
    agreed: int = 0
    compared: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def line(self) -> str:
        """Return the round for the screen."""
        copies = f", {self.copied} copied, {self.answered} of them answered" if self.shadow else ""
        copies += "".join(f", {count} {reason}" for reason, count in self.refused.items())
        return (
            f"  {'shadow' if self.shadow else 'alone':<6} {self.requests} requests: "
            f"p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, {sum(self.failed.values())} failed{copies}"
        )


def deploy(running: stack.Stack, instances: int) -> None:
    """Serve version 1, and start version 2 without traffic, each on one replica."""
    options_ = ("--max-batch", "1", "--instances", str(instances))
    running.deploy(MODEL, NAME, *options_)
    with tempfile.TemporaryDirectory() as folder:
        # A different file, because the same file would be the same version.
        other = Path(folder) / "model.py"
        other.write_text(f"{MODEL.read_text()}# the shadow\n")
        signature = str(MODEL.with_name("signature.json"))
        scale = ("--no-traffic", "--min", "1", "--max", "1")
        running.command("deploy", str(other), "--name", NAME, "--signature", signature, *scale, *options_)
    until(lambda: _ready(running), f"{SHADOW} has no ready replica")


def _ready(running: stack.Stack) -> bool:
    found = json.loads(running.command("replicas", "--json"))["items"]
    return any(each["deployment"] == SHADOW and each["state"] == "ready" for each in found)


async def capacity(port: int, seconds: float, model_ms: float) -> float:
    """Return the requests per second of callers that each wait for their answer."""
    exchange, done = sleeper.exchange(model_ms=model_ms), 0
    client, end = Client(port), time.monotonic() + seconds

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end:
            answer = await client.post(exchange.path, exchange.body, exchange.headers)
            exchange.check(answer.headers, answer.body)
            done += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    client.close()
    return done / seconds


def arrivals(rate: float, seconds: float) -> list[float]:
    """Return the times of a Poisson process in seconds, always the same for the same rate."""
    drawn, at, times = random.Random(SEED), 0.0, []
    while (at := at + drawn.expovariate(rate)) < seconds:
        times.append(at)
    return times


def reported(running: stack.Stack) -> dict[str, Any]:
    """Return the report of the shadow's copies; empty before the router has counts."""
    return json.loads(running.command("shadow", NAME, "--json"))["report"] or {}


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; raise StackFailed after ``READY_S``."""
    end = time.monotonic() + READY_S
    while not condition():
        if time.monotonic() > end:
            raise stack.StackFailed(f"{what} after {READY_S:g} s")
        time.sleep(0.5)


def measure(running: stack.Stack, times: list[float], model_ms: float, rate: float, *, shadow: bool) -> Round:
    """Run one round. With ``shadow``, begin when the gateway knows it, and wait for all copies."""
    exchange = sleeper.exchange(model_ms=model_ms)
    before: dict[str, Any] = {}
    if shadow:
        running.command("rollout", NAME, "--to", "v2", "--shadow", "--rate", f"{rate:g}")

        def begun() -> bool:
            asyncio.run(offer(running.gateway_port, exchange, [0.0]))
            before.update(reported(running))
            return bool(before.get("offered"))

        until(begun, "the gateway does not know the shadow")
    else:
        # A shadow that is stopped goes to sleep, so this one stays, and gets next to no copies.
        running.command("rollout", NAME, "--to", "v2", "--shadow", "--rate", "0.001")
    time.sleep(SETTLE_S)
    asked = asyncio.run(offer(running.gateway_port, exchange, times))
    took = [each.took_ms for each in asked if each.good]
    found: dict[str, Any] = {}
    if shadow:
        until(lambda: _ended(reported(running), len(took), rate), "copies were in flight")
        found = reported(running)
    counts = {
        each: found.get(each, 0) - before.get(each, 0)
        for each in ("copied", "answered", "agreed", "compared")
    }
    return Round(
        shadow, len(asked), percentile(took, 50), percentile(took, 99), failures(asked), **counts,
        refused=found.get("refused", {}),
    )  # fmt: skip


def _ended(found: dict[str, Any], requests: int, rate: float) -> bool:
    """Return True if the report has all requests of a round, and no copy is on its way."""
    known = sum(found["refused"].values()) + found["copied"]
    all_there = rate < 100 or found["offered"] >= requests
    return bool(all_there and known >= found["offered"] and not found["in_flight"])


def main() -> int:
    """Run, print, write shadow.json. Return 1 if the primary's p99 with a shadow is above the bar."""
    chosen = _arguments()
    machine = report.machine()
    rounds: list[Round] = []
    busy = {"TIDEGATE_SHADOW_HOST_BUSY": f"{chosen.host_busy:g}"}
    with session.session(), stack.tidegate("shadow", busy) as running:
        deploy(running, chosen.instances)
        asyncio.run(capacity(running.gateway_port, 2.0, chosen.model_ms))
        most = asyncio.run(capacity(running.gateway_port, min(chosen.seconds, 10), chosen.model_ms))
        times = arrivals(LOAD * most, chosen.seconds)
        print(f"capacity {most:.0f} requests/s; {LOAD:.0%} of it: {LOAD * most:.0f}/s", flush=True)
        for turn in range(2 * chosen.repeats):
            # without, with, with, without, ...: a drift of the machine affects both alike
            shadow = turn % 4 in (1, 2)
            rounds.append(measure(running, times, chosen.model_ms, chosen.rate, shadow=shadow))
            print(rounds[-1].line(), flush=True)
    return _judge(rounds, chosen, most, machine)


def _judge(rounds: list[Round], chosen: argparse.Namespace, most: float, machine: dict[str, Any]) -> int:
    alone, beside = ([each for each in rounds if each.shadow is on] for on in (False, True))
    p50 = median(each.p50_ms for each in beside) / median(each.p50_ms for each in alone)
    ours, theirs = (median(each.p99_ms for each in some) for some in (alone, beside))
    ratio = theirs / ours
    share = sum(each.copied for each in beside) / max(1, sum(each.requests for each in beside))
    failed = sum(sum(each.failed.values()) for each in rounds)
    enough = share >= COPIED * chosen.rate / 100
    right = ratio <= BAR and not failed and enough
    print(
        f"{'PASS' if right else 'MISS'}  p99 {ours:.2f} ms alone, {theirs:.2f} ms with a shadow: "
        f"{ratio:.3f} times (at most {BAR:g}); p50 {p50:.3f} times; {share:.1%} of the requests were copied; "
        f"{failed} failed requests"
    )
    if not enough:
        print(
            f"      At least {COPIED * chosen.rate:.0f}% of the requests must be copied, or the ratio says "
            "little. Run this on an idle machine, or allow copies on a busy one: --host-busy 1"
        )
    print(report.machine_line(machine))
    chosen.out.mkdir(parents=True, exist_ok=True)
    told = {"capacity": most, "load": LOAD, "ratio": ratio, "copied": share, "failed": failed}
    report.write_json(
        chosen.out / "shadow.json", {"machine": machine, **told, "rounds": [asdict(each) for each in rounds]}
    )
    return 0 if right else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=20, repeats=6)
    parser.add_argument("--rate", type=float, default=100.0, help="percent of copies (default: 100)")
    parser.add_argument("--model-ms", type=float, default=20.0, help="time of a call (default: 20)")
    parser.add_argument(
        "--host-busy", type=float, default=0.9, help="no copies above this share of busy cores (default: 0.9)"
    )
    parser.add_argument("--instances", type=int, default=4, help="of each version (default: 4)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
