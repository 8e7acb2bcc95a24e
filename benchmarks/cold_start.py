"""``python -m benchmarks.cold_start``: measure the wait of the first request to a sleeping model.

The digits example at zero replicas gets several requests, first in a stack without a warm pool, then in one
with a warm pool. Before each request the model goes back to sleep. The result is the caller's wait, and the
phases of the start that the worker measures. `rest` is the remaining part of the wait: until the autoscaler
sees the request, until the worker has its queue, and the call itself.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import model, options, report, session, stack, workloads
from benchmarks.stack import Stack
from benchmarks.watch import Watch, watching

DEPLOYMENT = "digits-v1"
PARTS = ("launch", "fetch", "triton_start", "load", "warm_up")
LIMIT_S = 60.0
PLAIN, POOL = "no pool", "warm pool"


def main() -> int:
    """Measure, print, write cold_start.json. Return 1 if the warm pool did not serve."""
    chosen = _arguments()
    machine = report.machine()
    with session.session():
        model.ensure_digits()
        found: dict[str, list[dict[str, float]]] = {}
        for name, extra in ((PLAIN, {}), (POOL, {"TIDEGATE_AUTOSCALER_WARM": '{"cpu": 1}'})):
            print(f"{name}:", flush=True)
            with stack.tidegate("cold-start", extra) as running:
                sleeps = ("--min", "0", "--max", "1", "--scale-to-zero-after", "1")
                running.command("deploy", str(workloads.onnx_model()), "--name", "digits", *sleeps)
                found[name] = asyncio.run(measure(running, chosen.repeats, pool=name == POOL))
    rows = {name: medians(starts) for name, starts in found.items()}
    ratio = rows[POOL]["total"] / rows[PLAIN]["total"]
    print(f"\n{report.machine_line(machine)}\n")
    print(table(rows))
    print(f"\nWith the pool the caller waits {ratio:.2f}x as long.")
    out: Path = chosen.out / "cold_start.json"
    report.write_json(out, {"machine": machine, "starts": found, "medians": rows, "ratio": ratio})
    print(f"\nResults: {out}")
    return 0


async def measure(running: Stack, repeats: int, *, pool: bool) -> list[dict[str, float]]:
    """Return the phases of several cold starts, in milliseconds; ``total`` is the caller's wait."""
    asked = workloads.exchange("digits", "oip")
    starts = []
    async with watching(running, DEPLOYMENT) as watch, httpx.AsyncClient(trust_env=False) as http:
        for number in range(repeats):
            await asleep(watch, pool=pool)
            begun = time.perf_counter()
            answer = await http.post(
                f"{running.url}{asked.path}", content=asked.body, headers=asked.headers, timeout=LIMIT_S
            )
            total_ms = (time.perf_counter() - begun) * 1000.0
            answer.raise_for_status()
            asked.check(answer.headers, answer.content)
            starts.append(await parts_of(watch, total_ms, pool=pool))
            told = ", ".join(f"{part} {ms:.0f}" for part, ms in starts[-1].items())
            print(f"  start {number + 1}: {told} ms", flush=True)
    return starts


async def asleep(watch: Watch, *, pool: bool) -> None:
    """Wait until no replica runs. With a warm pool, also wait until its worker has started."""
    await watch.until_ready(0, LIMIT_S)
    while pool and not (await watch.http.get("/v1/warm")).json()["items"][0]["ready"]:
        await asyncio.sleep(0.1)
    await asyncio.sleep(1.0)


async def parts_of(watch: Watch, total_ms: float, *, pool: bool) -> dict[str, float]:
    """Return the phases that the worker reported, and the caller's wait."""
    await watch.until_ready(1, LIMIT_S)
    start: dict[str, Any] = watch.status["cold_starts"][0]
    if start["warm"] != pool:
        raise stack.StackFailed(f"{start['replica']} {'did not come' if pool else 'came'} from a warm pool")
    told = {part: start["phases_ms"].get(part, 0.0) for part in PARTS}
    return {"total": total_ms, **told, "rest": total_ms - sum(told.values())}


def medians(starts: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each phase."""
    return {part: median(start[part] for start in starts) for part in starts[0]}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Print one line per variant, in milliseconds."""
    parts = ["total", *PARTS, "rest"]
    lines = ["| ms | " + " | ".join(part.replace("_", " ") for part in parts) + " |"]
    lines.append("|---" * (len(parts) + 1) + "|")
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[part]:,.0f}" for part in parts) + " |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    return options.parser(__doc__, repeats=7).parse_args()


if __name__ == "__main__":
    session.run(main)
