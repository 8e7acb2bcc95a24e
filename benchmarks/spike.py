"""``python -m benchmarks.spike``: ten times the load for two minutes, on one replica that may become four.

The model sleeps 100 ms and runs one call at a time, so the cores are not the limit. Requests arrive at random
(Poisson): three a second, then thirty for two minutes, then three again. The results are the time until the
wait is below its target again, the p99 during and after the spike, the lost requests, and whether the
replicas went up once and down once. The same arrivals are also replayed with Tidegate's policy and the
formulas of KEDA and Knative.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import open_loop, options, report, session, sleeper, stack
from benchmarks.open_loop import Asked, percentile
from benchmarks.stack import Stack
from benchmarks.watch import Look, Watch, watching
from services.autoscaler.adapters.replay_picture import draw

MODEL_MS, TARGET_MS = 100.0, 200.0
BASE_RPS, FACTOR, MOST = 3.0, 10.0, 4
BEFORE_S, SPIKE_S = 45.0, 120.0
SEED = 7
# The wait must stay below its target for this many seconds.
CALM_S = 10
DEPLOYMENT = "sleep-v1"
TITLES = {"live": "Tidegate", "keda": "KEDA + HPA", "knative": "Knative KPA"}


def main() -> int:
    """Measure, print, write spike.json, spike.png and spike-replay.png. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    times = arrivals(chosen.after)
    with session.session(), stack.tidegate("spike") as running:
        deploy(running)
        print(f"serving; {len(times)} requests in {times[-1]:.0f} s", flush=True)
        asked, looks, replayed = asyncio.run(measure(running, times))
    figures = figures_of(asked, looks)
    verdicts = judge(figures)
    print(f"\n{report.machine_line(machine)}\n")
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    print(f"\nThe same arrivals in the replay:\n\n{replay_table(replayed['results'])}\n")
    print("\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    document = {
        "machine": machine,
        "figures": figures,
        "replay": replayed["results"],
        "service": replayed["service"],
        "looks": [asdict(look) for look in looks],
        "asked": [[round(each.at, 3), round(each.took_ms, 1), each.status] for each in asked],
        "bars": verdicts,
    }
    out: Path = chosen.out
    report.write_json(out / "spike.json", document)
    pictures(out, asked, looks, replayed["timelines"])
    print(f"\nResults: {out / 'spike.json'}\nPictures: {out / 'spike.png'}, {out / 'spike-replay.png'}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def arrivals(after_s: float) -> list[float]:
    """Return the times of the requests, in seconds from the beginning."""
    draws, found, at = random.Random(SEED), list[float](), 0.0
    for rate, end in (
        (BASE_RPS, BEFORE_S),
        (BASE_RPS * FACTOR, BEFORE_S + SPIKE_S),
        (BASE_RPS, BEFORE_S + SPIKE_S + after_s),
    ):
        while (step := draws.expovariate(rate)) < end - at:
            at += step
            found.append(at)
        at = end
    return found


def deploy(running: Stack) -> None:
    """Serve the sleeper with one replica that may become four."""
    path = stack.EXAMPLES / "sleep" / "model.py"
    running.command(
        *("deploy", str(path), "--name", "sleep", "--signature", str(path.with_name("signature.json"))),
        *("--max-batch", "1", "--min", "1", "--max", str(MOST), "--target-wait-ms", f"{TARGET_MS:g}"),
    )


async def measure(running: Stack, times: Sequence[float]) -> tuple[list[Asked], list[Look], dict[str, Any]]:
    """Return the requests, the autoscaler's states, and the replay of the same arrivals."""
    exchange = sleeper.exchange(model_ms=MODEL_MS)
    async with watching(running, DEPLOYMENT) as watch:
        await watch.until_ready(1, 60)
        watch.looks, watch.begun = [], time.monotonic()
        looking = asyncio.create_task(watch.run())
        asked = await open_loop.offer(running.gateway_port, exchange, times)
        looking.cancel()
        return asked, list(watch.looks), await replay(watch, asked)


async def replay(watch: Watch, asked: Sequence[Asked]) -> dict[str, Any]:
    """Replay the arrivals with Tidegate's policy and with the formulas of other products."""
    order = {
        "deployment": DEPLOYMENT,
        "arrivals": {"kind": "csv", "text": "\n".join(f"{each.at:.4f}" for each in asked)},
        "others": ["keda", "knative"],
        "service": {"call_ms": MODEL_MS, "batch": 1},
    }
    answer = await watch.http.post("/v1/replay", json=order)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def pictures(
    out: Path,
    asked: Sequence[Asked],
    looks: Sequence[Look],
    replayed: dict[str, dict[str, list[float]]],
) -> None:
    """Return the measured curve and the replay of the same arrivals."""
    measured = course(asked, looks)
    failed = sum(not each.good for each in asked)
    title = f"10x the load for two minutes: {len(asked):,} requests, {failed or 'none'} lost"
    (out / "spike.png").write_bytes(draw(title, {"measured": measured}, TARGET_MS))
    names = {"live": "replayed"}
    courses = {"measured": measured} | {names.get(name, name): each for name, each in replayed.items()}
    (out / "spike-replay.png").write_bytes(draw("The same arrivals in the replay", courses, TARGET_MS))


def course(asked: Sequence[Asked], looks: Sequence[Look]) -> dict[str, list[float]]:
    """Return the measurement by second, in the form of a replay."""
    count = int(max(asked[-1].at, looks[-1].at)) + 1
    came: list[list[Asked]] = [[] for _ in range(count)]
    for each in asked:
        came[int(each.at)].append(each)
    seen = [max((k for k in looks if k.at < second + 1), key=lambda k: k.at) for second in range(count)]
    return {
        "at": [float(second) for second in range(count)],
        "arrivals": [float(len(each)) for each in came],
        "backlog": [float(look.demand or 0) for look in seen],
        "ready": [float(look.ready) for look in seen],
        "target": [float(look.desired) for look in seen],
        "wait_p95_ms": [percentile([wait(a) for a in each], 95) for each in came],
    }


def wait(asked: Asked) -> float:
    """Return a request's time outside the model, in ms."""
    return max(0.0, asked.took_ms - MODEL_MS)


def figures_of(asked: Sequence[Asked], looks: Sequence[Look]) -> dict[str, Any]:
    """Summarize the run: waits in ms, times in seconds from the spike's beginning or end."""
    end = BEFORE_S + SPIKE_S
    back = back_under_target(asked)
    targets = [look.desired for look in looks]
    steps = [b - a for a, b in pairwise(targets) if a != b]
    during = [a for a in asked if BEFORE_S <= a.at < end]
    settled = [a for a in during if back is not None and a.at >= BEFORE_S + back]
    alone = (k.at - end for k in looks if k.at > end and k.desired == k.ready == 1)
    p99 = {
        "before": [a for a in asked if a.at < BEFORE_S],
        "during": during,
        "once_back": settled,
        "after": [a for a in asked if a.at >= end],
    }
    return {
        "requests": len(asked),
        "failed": sum(not a.good for a in asked),
        "failures": open_loop.failures(asked),
        "wait_back_under_target_s": back,
        **{f"wait_p99_{name}_ms": percentile([wait(a) for a in part], 99) for name, part in p99.items()},
        "most_replicas": max(targets),
        "steps": steps,
        "turns": sum((a > 0) != (b > 0) for a, b in pairwise(steps)),
        "back_to_one_after_s": next(alone, None),
    }


def back_under_target(asked: Sequence[Asked]) -> float | None:
    """Return the seconds of the spike until the p95 of each second's waits stays below the target."""
    late = [
        percentile([wait(a) for a in asked if second <= a.at < second + 1], 95) > TARGET_MS
        for second in range(int(BEFORE_S), int(BEFORE_S + SPIKE_S))
    ]
    calm = (float(second) for second in range(len(late)) if not any(late[second : second + CALM_S]))
    return next(calm, None)


def judge(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the bars."""
    back, alone = figures["wait_back_under_target_s"], figures["back_to_one_after_s"]
    shown = "never" if alone is None else f"{alone:.0f} s"
    return [
        _bar(figures["failed"] == 0, f"{figures['failed']} of {figures['requests']:,} requests failed"),
        _bar(back is not None, f"the wait is back under {TARGET_MS:g} ms after {back} s"),
        _bar(figures["turns"] <= 1, f"replicas went {figures['steps']}: up once and down once"),
        _bar(alone is not None, f"back to one replica after the spike: {shown}"),
    ]


def _bar(met: bool, text: str) -> tuple[str, str]:
    return "PASS" if met else "MISS", text


def replay_table(results: Sequence[dict[str, Any]]) -> str:
    """Print the policies side by side."""
    head = ["", "late", "wait p95 ms", "wait p99 ms", "replica-hours", "most", "changes"]
    rows = [
        [
            TITLES[each["name"]],
            f"{each['late_share']:.1%}",
            f"{each['wait_p95_ms']:.0f}",
            f"{each['wait_p99_ms']:.0f}",
            f"{each['replica_hours']:.3f}",
            str(each["most_replicas"]),
            str(each["changes"]),
        ]
        for each in results
    ]
    return report.table(head, rows)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--after", type=float, default=90.0, help="seconds of the usual load after the spike (default: 90)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
