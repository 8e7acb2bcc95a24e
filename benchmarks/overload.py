"""``python -m benchmarks.overload``: measure a load above the capacity.

A model that sleeps 20 ms runs on one worker. Its capacity is measured in a closed loop. Then requests arrive
as a Poisson process at 0.5 to 3 times the capacity, each with a deadline. Goodput counts answers before the
deadline. With ``--max-batch 8 --rows 4`` a call has two requests. The prediction of a request's wait must
consider that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from benchmarks import options, report, session, sleeper, stack
from benchmarks.client import Client
from benchmarks.workloads import Exchange, WrongAnswer

SEED = 7
CALLERS = 8
MOST_IN_FLIGHT = 2000
GRACE_MS = 2000.0
GOODPUT_SHARE = 0.9
GOODPUT_AT = 2.0


@dataclass(slots=True)
class Step:
    """One offered load. Times in ms are those of the callers; ``refused`` counts answers by reason."""

    offered_x: float
    offered: float
    seconds: float
    deadline_ms: float
    in_time_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def keep(self, status: int, body: bytes, took_ms: float) -> None:
        """Count one answer. An accepted request that missed its deadline is late."""
        if status == 200:
            (self.in_time_ms if took_ms <= self.deadline_ms else self.late_ms).append(took_ms)
            return
        reason = str(json.loads(body).get("reason", status))
        self.refused[reason] += 1
        if status == 504:
            self.late_ms.append(took_ms)

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the step."""
        accepted = sorted(self.in_time_ms + self.late_ms)
        return {
            "offered_x": self.offered_x,
            "offered": self.offered,
            "seconds": self.seconds,
            "goodput": len(self.in_time_ms) / self.seconds,
            "late": len(self.late_ms),
            "p50_ms": _quantile(accepted, 50),
            "p99_ms": _quantile(accepted, 99),
            "refused": dict(self.refused),
        }


def main() -> int:
    """Measure, print, write overload.json and overload.png. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("overload") as running:
        sleeper.deploy(running, replicas=1, max_batch=chosen.max_batch)
        print("serving; measuring the capacity", flush=True)
        capacity, steps = asyncio.run(measure(running.gateway_port, chosen))
    rows = [step.to_json() for step in steps]
    verdicts = judge(rows, chosen.deadline_ms)
    print(f"\n{report.machine_line(machine)}; {chosen.seconds} s a step, deadline {chosen.deadline_ms:g} ms")
    print(f"capacity, closed loop with {CALLERS} callers: {capacity:.1f} requests/s\n\n{_table(rows)}\n")
    print("\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "overload.json"
    document = {"capacity": capacity, "deadline_ms": chosen.deadline_ms, "steps": rows, "bars": verdicts}
    report.write_json(out, {"machine": machine} | document)
    print(f"\nResults: {out}\n{report.draw('overload', out)}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


async def measure(port: int, chosen: argparse.Namespace) -> tuple[float, list[Step]]:
    """Return the capacity in requests per second, and every step."""
    client = Client(port)
    try:
        await closed_loop(client, 2.0, chosen.rows)
        capacity = await closed_loop(client, float(chosen.seconds), chosen.rows)
        steps = []
        for offered_x in chosen.steps:
            step = Step(offered_x, offered_x * capacity, float(chosen.seconds), chosen.deadline_ms)
            await offer(client, step, random.Random(SEED), chosen.rows)
            steps.append(step)
            goodput = step.to_json()["goodput"]
            print(
                f"  {offered_x:g}x: {step.offered:.0f}/s offered, {goodput:.1f}/s in time",
                flush=True,
            )
            # Waiting requests belong to this step, not to the next one.
            await asyncio.sleep(chosen.deadline_ms / 1e3)
        return capacity, steps
    finally:
        client.close()


async def closed_loop(client: Client, seconds: float, rows: int) -> float:
    """Measure the requests per second of callers that each wait for their response."""
    exchange, done = sleeper.exchange(rows=rows), 0
    end = time.monotonic() + seconds

    async def caller() -> None:
        nonlocal done
        while time.monotonic() < end:
            answer = await client.post(exchange.path, exchange.body, exchange.headers)
            if answer.status != 200:
                raise WrongAnswer(f"HTTP {answer.status}: {answer.body[:200].decode(errors='replace')}")
            exchange.check(answer.headers, answer.body)
            done += 1

    began = time.monotonic()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return done / (time.monotonic() - began)


async def offer(client: Client, step: Step, draw: random.Random, rows: int) -> None:
    """Send the step's requests without waiting for earlier ones. Then wait for all responses."""
    exchange = sleeper.exchange(step.deadline_ms, rows=rows)
    tasks: set[asyncio.Task[None]] = set()
    at, end = time.monotonic(), time.monotonic() + step.seconds
    while (at := at + draw.expovariate(step.offered)) < end:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        if len(tasks) >= MOST_IN_FLIGHT:
            step.refused["not sent: too many in flight"] += 1
            continue
        task = asyncio.create_task(_ask(client, exchange, step))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def _ask(client: Client, exchange: Exchange, step: Step) -> None:
    began = time.monotonic()
    try:
        async with asyncio.timeout((step.deadline_ms + GRACE_MS) / 1e3):
            answer = await client.post(exchange.path, exchange.body, exchange.headers)
    except TimeoutError:
        step.refused["no answer"] += 1
        step.late_ms.append((time.monotonic() - began) * 1e3)
        return
    except (OSError, EOFError):
        step.refused["connection broken"] += 1
        return
    step.keep(answer.status, answer.body, (time.monotonic() - began) * 1e3)


def judge(rows: list[dict[str, Any]], deadline_ms: float) -> list[tuple[str, str]]:
    """Return the bars: goodput at twice the capacity, p99 of accepted requests, and the reject reasons."""
    peak = max(row["goodput"] for row in rows)
    verdicts = []
    for row in rows:
        if row["offered_x"] == GOODPUT_AT:
            share = row["goodput"] / peak if peak else 0.0
            text = f"goodput at {GOODPUT_AT:g}x is {share:.0%} of the peak, at least {GOODPUT_SHARE:.0%}"
            verdicts.append(("PASS" if share >= GOODPUT_SHARE else "MISS", text))
    worst = max(row["p99_ms"] for row in rows)
    text = (
        f"p99 of accepted requests is at most {worst:.0f} ms at any load, the deadline is {deadline_ms:g} ms"
    )
    verdicts.append(("PASS" if worst <= deadline_ms else "MISS", text))
    others = sorted({reason for row in rows for reason in row["refused"]} - {"overloaded", "deadline_passed"})
    text = f"reject reasons other than overload: {', '.join(others) or 'none'}"
    verdicts.append(("MISS" if others else "PASS", text))
    return verdicts


def _quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _table(rows: list[dict[str, Any]]) -> str:
    reasons = sorted({reason for row in rows for reason in row["refused"]})
    lines = [
        [
            f"{row['offered_x']:g}x",
            f"{row['offered']:.0f}",
            f"{row['goodput']:.1f}",
            f"{row['p50_ms']:.0f}",
            f"{row['p99_ms']:.0f}",
            str(row["late"]),
            *(str(row["refused"].get(reason, 0)) for reason in reasons),
        ]
        for row in rows
    ]
    head = ["offered", "per second", "goodput/s", "p50 ms", "p99 ms", "late", *reasons]
    return report.table(head, lines)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=10)
    parser.add_argument(
        "--steps",
        type=options.fractions,
        default=[0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0],
        help="offered loads as multiples of the capacity, comma-separated",
    )
    parser.add_argument("--deadline-ms", type=float, default=500.0, help="of each request (default: 500)")
    parser.add_argument("--max-batch", type=int, default=1, help="rows that a call may have (default: 1)")
    parser.add_argument("--rows", type=int, default=1, help="rows of a request (default: 1)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
