"""``python -m benchmarks.healing``: kill twenty workers one after the other while requests arrive.

Five replicas of a model that sleeps 100 ms get twelve requests a second. Every 15 seconds, the worker that
has been ready for the longest time is killed with -9. Each request must succeed. The result is the time until
a replacement is ready. The pause between kills is needed because a replica that dies within a minute after it
was ready is restarted with longer and longer delays.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import open_loop, options, report, session, sleeper, stack
from benchmarks.open_loop import Asked, percentile
from benchmarks.stack import Stack
from benchmarks.watch import Watch, watching

MODEL_MS, RPS, REPLICAS = 100.0, 12.0, 5
BETWEEN_S, LIMIT_S = 15.0, 60.0
SEED = 7
DEPLOYMENT = "sleep-v1"


def main() -> int:
    """Measure, print, write healing.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("healing") as running:
        sleeper.deploy(running, replicas=REPLICAS)
        print(f"serving with {REPLICAS} replicas", flush=True)
        asked, took = asyncio.run(measure(running, chosen.kills))
    figures = {
        "requests": len(asked),
        "failed": sum(not each.good for each in asked),
        "failures": open_loop.failures(asked),
        "kills": len(took),
        "replaced_mean_s": fmean(took),
        "replaced_longest_s": max(took),
        "took_p50_ms": percentile([each.took_ms for each in asked], 50),
        "took_p99_ms": percentile([each.took_ms for each in asked], 99),
        "took_max_ms": max(each.took_ms for each in asked),
    }
    verdicts = judge(figures, chosen.kills)
    print(f"\n{report.machine_line(machine)}\n")
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    print("\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "healing.json"
    report.write_json(out, {"machine": machine, "figures": figures, "replaced_s": took, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


async def measure(running: Stack, kills: int) -> tuple[list[Asked], list[float]]:
    """Return the requests, and for each kill the seconds until as many replicas were ready as before."""
    draws, times, at = random.Random(SEED), list[float](), 0.0
    while at < kills * (BETWEEN_S + LIMIT_S):
        at += draws.expovariate(RPS)
        times.append(at)
    took: list[float] = []
    done = asyncio.Event()
    async with watching(running, DEPLOYMENT) as watch:
        await watch.until_ready(REPLICAS, LIMIT_S)
        exchange = sleeper.exchange(model_ms=MODEL_MS)
        load = asyncio.create_task(open_loop.offer(running.gateway_port, exchange, times, until=done.is_set))
        for number in range(kills):
            await asyncio.sleep(BETWEEN_S)
            took.append(await kill_one(watch))
            print(f"  kill {number + 1}: replaced after {took[-1]:.1f} s", flush=True)
        await asyncio.sleep(2.0)
        done.set()
        return await load, took


async def kill_one(watch: Watch) -> float:
    """Kill the worker that has been ready longest. Return the seconds until a replacement is ready."""
    await watch.until_ready(REPLICAS, LIMIT_S)
    victim = min(watch.status["replicas"], key=lambda each: each["started_at"])
    os.kill(victim["pid"], signal.SIGKILL)
    begun = time.monotonic()
    while True:
        await watch.look()
        names = {r["replica"] for r in watch.status["replicas"] if r["state"] == "ready"}
        if victim["replica"] not in names and len(names) == REPLICAS:
            return time.monotonic() - begun
        if time.monotonic() - begun > LIMIT_S:
            raise TimeoutError(f"{victim['replica']} was not replaced within {LIMIT_S:g} s")
        await asyncio.sleep(0.05)


def judge(figures: dict[str, Any], kills: int) -> list[tuple[str, str]]:
    """Return the bars."""
    failed = f"{figures['failed']} of {figures['requests']:,} requests failed"
    mean = f"{figures['replaced_mean_s']:.1f} s on average"
    return [
        ("MISS" if figures["failed"] else "PASS", failed),
        (
            "PASS" if figures["kills"] == kills else "MISS",
            f"{figures['kills']} of {kills} workers replaced, {mean}",
        ),
    ]


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="workers to kill (default: 20)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
