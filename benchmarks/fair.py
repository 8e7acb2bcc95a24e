"""``python -m benchmarks.fair``: measure a light caller alone and beside another caller's flood.

A model that sleeps 20 ms runs on two workers. The light caller sends a request every 50 ms, first alone, then
beside a flood of ten times the capacity, each with an API key of its own. With ``--weight 3`` two floods
follow, one of a key with this weight, and the answers of both are counted.
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
from benchmarks.stack import Stack

SEED = 7
EVERY_S = 0.05
DEADLINE_MS = 2000.0
FLOOD_X = 10.0
MOST_IN_FLIGHT = 2000
WARM_UP_S = 3.0
MOST_RATIO = 2.0
WEIGHT_TOLERANCE = 0.1


@dataclass(slots=True)
class Caller:
    """One key: its answers and their times in ms, and the refusals by reason."""

    key: str
    times_ms: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    async def ask(self, client: Client, model_ms: float) -> None:
        """Send one request and count its answer."""
        exchange = sleeper.exchange(DEADLINE_MS, model_ms)
        headers = {**exchange.headers, "Authorization": f"Bearer {self.key}"}
        began = time.monotonic()
        try:
            answer = await client.post(exchange.path, exchange.body, headers)
        except (OSError, EOFError):
            self.refused["connection broken"] += 1
            return
        if answer.status == 200:
            self.times_ms.append((time.monotonic() - began) * 1e3)
        else:
            self.refused[str(json.loads(answer.body).get("reason", answer.status))] += 1

    def quantile(self, percent: int) -> float:
        """Return a percentile of the times in ms."""
        return quantiles(self.times_ms, n=100, method="inclusive")[percent - 1]


def main() -> int:
    """Measure, print and write fair.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    with session.session(), stack.tidegate("fair") as running:
        sleeper.deploy(running, chosen.replicas)
        keys = [_key(running, name, 1) for name in ("light", "flood")]
        keys.append(_key(running, "heavy", chosen.weight))
        time.sleep(WARM_UP_S)
        found = asyncio.run(_measure(running.gateway_port, keys, chosen))
    print(f"{report.machine_line(report.machine())}; {chosen.seconds} s a part, a model of {chosen.ms:g} ms")
    for name, value in found.items():
        print(f"  {name}: {value}")
    verdicts = judge(found, chosen.weight)
    print("\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "fair.json"
    report.write_json(out, {"machine": report.machine(), "bars": verdicts} | found)
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def _key(running: Stack, name: str, weight: int) -> str:
    made = running.command("keys", "create", name, "--weight", str(weight), "--json")
    return str(json.loads(made)["key"])


async def _measure(port: int, keys: list[str], chosen: argparse.Namespace) -> dict[str, Any]:
    light, flood, heavy = map(Caller, keys)
    client = Client(port)
    capacity = chosen.replicas * 1e3 / chosen.ms
    try:
        await _paced(client, light, WARM_UP_S, chosen.ms)
        light = Caller(light.key)
        await _paced(client, light, chosen.seconds, chosen.ms)
        beside = Caller(light.key)
        flooding = asyncio.create_task(
            _flood(client, flood, FLOOD_X * capacity, chosen.seconds + WARM_UP_S, chosen.ms)
        )
        await asyncio.sleep(WARM_UP_S)
        await _paced(client, beside, chosen.seconds, chosen.ms)
        await flooding
        found: dict[str, Any] = {
            "alone_p50_ms": round(light.quantile(50), 1),
            "alone_p99_ms": round(light.quantile(99), 1),
            "beside_p50_ms": round(beside.quantile(50), 1),
            "beside_p99_ms": round(beside.quantile(99), 1),
            "p99_ratio": round(beside.quantile(99) / light.quantile(99), 2),
            "light_refused": dict(beside.refused),
            "flood_per_s": round(len(flood.times_ms) / (chosen.seconds + WARM_UP_S), 1),
            "flood_p50_ms": round(flood.quantile(50), 1),
            "flood_refused": dict(flood.refused),
        }
        if chosen.weight > 1:
            usual = Caller(flood.key)
            rate = FLOOD_X / 2 * capacity
            await asyncio.gather(
                *(_flood(client, each, rate, chosen.seconds, chosen.ms) for each in (usual, heavy))
            )
            found["answers_by_weight"] = {chosen.weight: len(heavy.times_ms), 1: len(usual.times_ms)}
        return found
    finally:
        client.close()


async def _paced(client: Client, caller: Caller, seconds: float, model_ms: float) -> None:
    """Send a request every 50 ms, each at a random moment of its 50 ms."""
    draw, asked = random.Random(SEED), []
    began = time.monotonic()
    for number in range(int(seconds / EVERY_S)):
        at = began + (number + draw.random() * 0.5) * EVERY_S
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        asked.append(asyncio.create_task(caller.ask(client, model_ms)))
    await asyncio.gather(*asked)


async def _flood(client: Client, caller: Caller, rate: float, seconds: float, model_ms: float) -> None:
    draw = random.Random(caller.key)
    tasks: set[asyncio.Task[None]] = set()
    at, end = time.monotonic(), time.monotonic() + seconds
    while (at := at + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        if len(tasks) >= MOST_IN_FLIGHT:
            caller.refused["not sent: too many in flight"] += 1
            continue
        task = asyncio.create_task(caller.ask(client, model_ms))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


def judge(found: dict[str, Any], weight: int) -> list[tuple[str, str]]:
    """Return the bars: the light caller's p99, its refusals, and the ratio of two weights."""
    ratio, refused = found["p99_ratio"], sum(found["light_refused"].values())
    verdicts = [
        (
            "PASS" if ratio <= MOST_RATIO else "MISS",
            f"the light caller's p99 beside the flood is {ratio:g} times alone's, at most {MOST_RATIO:g}",
        ),
        ("MISS" if refused else "PASS", f"{refused} requests of the light caller were refused"),
    ]
    if counts := found.get("answers_by_weight"):
        got = counts[weight] / max(counts[1], 1)
        good = abs(got / weight - 1) <= WEIGHT_TOLERANCE
        verdicts.append(("PASS" if good else "MISS", f"weights {weight} : 1 got answers {got:.2f} : 1"))
    return verdicts


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=20)
    parser.add_argument("--replicas", type=int, default=2, help="workers of the model (default: 2)")
    parser.add_argument(
        "--ms", type=float, default=20.0, help="how long a call of the model takes (default: 20)"
    )
    parser.add_argument(
        "--weight", type=int, default=3, help="of the second flood; 1: no second part (default: 3)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
