"""``python -m benchmarks.heavy``: check that envelopes do not slow down loads that cannot gain from them.

First, a model that sleeps 20 ms, with 4 workers and 64 connections: the default gateway and one that sends
every request as a separate message are loaded alternately. Then a light and a heavy Deployment run side by
side, in one stack and in two stacks. The difference shows the cost of a shared queue, apart from that of
shared cores. Four callers that send the next request immediately use all cores, so any other load slows them
down. Therefore the light Deployment is also loaded at a quarter of that rate, by callers that do not wait for
each other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks import load, open_loop, options, report, session, sleeper, stack, workloads
from benchmarks.load import Figures, Load
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange

WORKERS, CONNECTIONS, LIGHT_CONNECTIONS = 4, 64, 4
SINGLE = {"TIDEGATE_ENVELOPE_MAX_FRAMES": "1"}
ELSEWHERE = ", two stacks"
PACED = "light at a quarter"
PACE_SHARE, SEED = 0.25, 7
RATE_SHARE, P99_SHARE, MIX_SHARE, MIX_MS = 0.97, 1.10, 0.90, 0.5

Runs = dict[str, list[Figures]]


def main() -> int:
    """Measure, print, write heavy.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session():
        runs = measure(chosen.repeats, chosen.seconds)
    print(f"\n{report.machine_line(machine)}; {chosen.seconds} s a run, {chosen.repeats} rounds\n")
    verdicts = judge(runs)
    print(_table(runs), "\n".join(f"{verdict}  {text}" for verdict, text in verdicts), sep="\n\n")
    out: Path = chosen.out / "heavy.json"
    figures = {name: [run.to_json() for run in all_runs] for name, all_runs in runs.items()}
    report.write_json(out, {"machine": machine, "runs": figures, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def measure(repeats: int, seconds: int) -> Runs:
    """Run both stacks; one is idle while the other is under load."""
    runs: Runs = {}
    heavy, light = sleeper.exchange(), workloads.exchange("identity", "oip")
    with ExitStack() as held:
        shipped = _start(held, "heavy-envelopes", {})
        single = _start(held, "heavy-single", SINGLE)
        shipped.deploy(stack.EXAMPLES / "identity" / "model.py", "identity")
        for number in range(repeats):
            print(f"round {number + 1} of {repeats}", flush=True)
            for name, running in (("envelopes", shipped), ("single", single)):
                load.warm(running.url, heavy, CONNECTIONS)
                keep(runs, name, load.measure(running.url, heavy, CONNECTIONS, seconds))
            load.warm(shipped.url, light, LIGHT_CONNECTIONS)
            keep(runs, "light alone", load.measure(shipped.url, light, LIGHT_CONNECTIONS, seconds))
            rate = runs["light alone"][-1].rate * PACE_SHARE
            keep(runs, f"{PACED} alone", paced(shipped, light, rate, seconds))
            load.warm(shipped.url, heavy, CONNECTIONS)
            beside = Load(shipped.url, heavy, CONNECTIONS, seconds + 1)
            held.callback(beside.stop)
            keep(runs, f"{PACED} beside heavy", paced(shipped, light, rate, seconds))
            keep(runs, f"heavy beside {PACED}", beside.result())
            load.warm(single.url, heavy, CONNECTIONS)
            for where, other in (("", shipped), (ELSEWHERE, single)):
                mixed(runs, where, (shipped, light), (other, heavy), seconds)
    return runs


def mixed(
    runs: Runs, where: str, light: tuple[Stack, Exchange], heavy: tuple[Stack, Exchange], seconds: int
) -> None:
    """Run both loads concurrently, each on its stack. ``where`` is the suffix of the runs' names."""
    with ExitStack() as held:
        both = [
            (name + where, Load(running.url, exchange, connections, seconds))
            for name, (running, exchange), connections in (
                ("light beside heavy", light, LIGHT_CONNECTIONS),
                ("heavy beside light", heavy, CONNECTIONS),
            )
        ]
        for _, each in both:
            held.callback(each.stop)
        for name, each in both:
            keep(runs, name, each.result())


def paced(running: Stack, light: Exchange, rate: float, seconds: int) -> Figures:
    """Send ``rate`` requests a second at random times (Poisson), on as many connections as needed."""
    draws, at, times = random.Random(SEED), 0.0, []
    while (at := at + draws.expovariate(rate)) < seconds:
        times.append(at)
    asked = asyncio.run(open_loop.offer(running.gateway_port, light, times))
    took = [each.took_ms for each in asked]
    p50, p90, p99 = (open_loop.percentile(took, percent) for percent in (50, 90, 99))
    ended = max(each.at + each.took_ms / 1e3 for each in asked)
    errors = sum(not each.good for each in asked)
    return Figures(0, len(asked), max(seconds, ended), p50, p90, p99, max(took), errors)


def keep(runs: Runs, name: str, figures: Figures) -> None:
    """Store the figures of one run and print them."""
    runs.setdefault(name, []).append(figures)
    print(
        f"  {name:30} {figures.rate:8,.1f} req/s  p99 {figures.p99_ms:7.1f} ms  {figures.errors} errors",
        flush=True,
    )


def judge(runs: Runs) -> list[tuple[str, str]]:
    """Return the bars, on the medians of the rounds."""
    rate, p50, p99 = (_medians(runs, figure) for figure in ("rate", "p50_ms", "p99_ms"))
    beside, mixed_light = rate["heavy beside light"], rate["light beside heavy"]
    errors = float(sum(run.errors for each in runs.values() for run in each))
    return [
        _bar("envelopes against single messages, throughput", rate["envelopes"] / rate["single"], RATE_SHARE),
        _bar(
            "envelopes against single messages, p99", p99["envelopes"] / p99["single"], P99_SHARE, most=True
        ),
        _bar("heavy beside light against alone, throughput", beside / rate["envelopes"], MIX_SHARE),
        _bar("light beside heavy against alone, throughput", mixed_light / rate["light alone"], MIX_SHARE),
        _bar(
            f"heavy beside {PACED} against alone, throughput",
            rate[f"heavy beside {PACED}"] / rate["envelopes"],
            MIX_SHARE,
        ),
        _bar(
            f"{PACED} of its pace beside heavy less alone, p50 in ms",
            p50[f"{PACED} beside heavy"] - p50[f"{PACED} alone"],
            MIX_MS,
            most=True,
        ),
        _bar(
            "light beside heavy in one stack against in two, throughput",
            mixed_light / rate["light beside heavy" + ELSEWHERE],
            MIX_SHARE,
        ),
        _bar(
            "heavy beside light in one stack against in two, throughput",
            beside / rate["heavy beside light" + ELSEWHERE],
            MIX_SHARE,
        ),
        _bar("errors", errors, 0, most=True),
    ]


def _bar(text: str, value: float, limit: float, *, most: bool = False) -> tuple[str, str]:
    met = value <= limit if most else value >= limit
    return "PASS" if met else "MISS", f"{text}: {value:.2f}, {'at most' if most else 'at least'} {limit:.2f}"


def _medians(runs: Runs, figure: str) -> dict[str, float]:
    return {name: median(getattr(run, figure) for run in each) for name, each in runs.items()}


def _table(runs: Runs) -> str:
    rows = [
        [
            name,
            str(each[0].connections or "as come"),
            f"{median(run.rate for run in each):,.1f}",
            f"{median(run.p50_ms for run in each):.1f}",
            f"{median(run.p99_ms for run in each):.1f}",
            str(sum(run.errors for run in each)),
        ]
        for name, each in runs.items()
    ]
    return report.table(["", "connections", "req/s", "p50 ms", "p99 ms", "errors"], rows)


def _start(held: ExitStack, name: str, extra: dict[str, str]) -> Stack:
    print(f"starting {name}, {WORKERS} workers", flush=True)
    running = held.enter_context(stack.tidegate(name, extra))
    sleeper.deploy(running, replicas=WORKERS)
    return running


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=10, repeats=3)
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
