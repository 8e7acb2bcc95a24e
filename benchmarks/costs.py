"""``python -m benchmarks.costs``: compare the cost ledger with an observer of the workers' processes.

Replicas of a model that sleeps 200 ms get requests in waves, so that they scale up and down. Another
Deployment of the model runs jobs. Some requests expire. Every 25 s, one worker is killed with -9. An observer
waits for the end of each process with a pidfd of its own. At the end all replicas stop. The sum of the ledger
must be the observed time within 0.1 %.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import select
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import open_loop, options, report, session, sleeper, stack
from benchmarks.stack import Stack
from tidegate import AsyncClient

MODEL_MS, RPS, WAVE_S = 200.0, 12.0, 30.0
KILL_EVERY_S, JOBS_EVERY_S, JOBS = 25.0, 10.0, 5
MAX_REPLICAS = 4
SEED = 7
ENDPOINT, JOBS_ENDPOINT = "sleep", "nightly"
LOOK_S, LIMIT_S = 0.05, 120.0
BAR = 0.001


@dataclass(slots=True)
class Seen:
    """A worker's process: its launch and its end, in seconds since the epoch."""

    pid: int
    began: float
    ended: float | None = None

    def wait(self, descriptor: int) -> None:
        """Wait for the end of the process, whose pidfd this is."""
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        waiting.poll()
        self.ended = time.time()
        os.close(descriptor)


@dataclass(slots=True)
class Observer:
    """Watches the workers' processes, without asking Tidegate. A thread waits for the end of each."""

    folder: Path
    seen: dict[str, Seen] = field(default_factory=dict)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Note new processes."""
        for path in self.folder.glob("*/process"):
            if path.parent.name not in self.seen:
                with contextlib.suppress(OSError, ValueError, IndexError):
                    pid = int(path.read_text().split()[0])
                    descriptor = os.pidfd_open(pid)
                    began = (path.parent / "fingerprint").stat().st_mtime  # the folder's first file
                    found = self.seen[path.parent.name] = Seen(pid, began)
                    threading.Thread(target=found.wait, args=(descriptor,), daemon=True).start()

    @property
    def alive(self) -> list[str]:
        """Return the replicas whose processes run."""
        return [name for name, each in self.seen.items() if each.ended is None]

    @property
    def seconds(self) -> float:
        """Return the time of all processes up to now."""
        now = time.time()
        return sum((each.ended or now) - each.began for each in self.seen.values())


def main() -> int:
    """Measure, print, write costs.json. Return 1 if the bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    extra = {"TIDEGATE_AUTOSCALER_DOWN_WINDOW_S": "5"}
    with session.session(), stack.tidegate("costs", extra) as running:
        path = stack.EXAMPLES / "sleep" / "model.py"
        running.deploy(path, ENDPOINT, "--max-batch", "1", "--max", str(MAX_REPLICAS))
        running.deploy(path, JOBS_ENDPOINT, "--max-batch", "1")
        figures = asyncio.run(measure(running, chosen.seconds, chosen.out / "costs.svg"))
    shown = figures.pop("report")
    off = abs(figures["ledger_s"] / figures["observed_s"] - 1)
    parts = sum(figures["parts_s"].values())
    verdicts = [
        (
            "PASS" if off <= BAR else "MISS",
            f"the ledger differs from the observer by {off:.4%} (bar {BAR:.1%})",
        ),
        (
            "PASS" if abs(parts - figures["ledger_s"]) < 1e-3 else "MISS",
            f"the parts sum to {parts:.3f} s, the ledger to {figures['ledger_s']:.3f} s",
        ),
    ]
    print(f"\n{report.machine_line(machine)}\n")
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    print("\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "costs.json"
    report.write_json(out, {"machine": machine, "figures": figures, "bars": verdicts, "report": shown})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


async def measure(running: Stack, seconds: float, picture: Path) -> dict[str, Any]:
    """Return the ledger's sums beside the observer's. Draw the report to ``picture``."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    observer = Observer(running.state / "replicas")
    draws, kills, jobs = random.Random(SEED), list[str](), list[str]()
    watch = asyncio.create_task(observer.run())
    tasks = [
        asyncio.create_task(_kill(observer, draws, kills)),
        asyncio.create_task(_submit(running, jobs)),
        asyncio.create_task(_expire(running)),
    ]
    try:
        asked = await open_loop.offer(
            running.gateway_port, sleeper.exchange(model_ms=MODEL_MS), _waves(draws, seconds)
        )
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for name in (ENDPOINT, JOBS_ENDPOINT):
        await asyncio.to_thread(running.command, "pause", name)
    async with asyncio.timeout(LIMIT_S):
        while observer.alive:
            await asyncio.sleep(LOOK_S)
    await asyncio.sleep(3.0)  # the autoscaler's next round sees the last end
    watch.cancel()
    since = str(int(seconds) + 3600) + "s"
    plot = ("--plot", str(picture), "--by", "endpoint")
    found = json.loads(await asyncio.to_thread(running.command, "costs", "--since", since, *plot, "--json"))
    return {
        "requests": len(asked),
        "failures": open_loop.failures(asked),
        "jobs": len(jobs),
        "kills": len(kills),
        "replicas": len(observer.seen),
        "observed_s": observer.seconds,
        "ledger_s": found["replica_seconds"],
        "launcher_s": found["observed_seconds"],
        "difference_ms_per_replica": (found["replica_seconds"] - observer.seconds)
        / len(observer.seen)
        * 1000,
        "counted_requests": found["total"]["requests"],
        "cost": found["total"]["cost"],
        "parts_s": {each["part"]: each["seconds"] for each in found["parts"]},
        "report": found,
    }


def _waves(draws: random.Random, seconds: float) -> list[float]:
    """Return the times of requests: half of each wave has load, the other half a tenth of it."""
    times, at = list[float](), 0.0
    while at < seconds:
        busy = at % WAVE_S < WAVE_S / 2
        at += draws.expovariate(RPS if busy else RPS / 10)
        times.append(at)
    return times


async def _kill(observer: Observer, draws: random.Random, kills: list[str]) -> None:
    while True:
        await asyncio.sleep(KILL_EVERY_S)
        if alive := observer.alive:
            victim = draws.choice(sorted(alive))
            with contextlib.suppress(ProcessLookupError):
                os.kill(observer.seen[victim].pid, signal.SIGKILL)
                kills.append(victim)


async def _submit(running: Stack, jobs: list[str]) -> None:
    async with AsyncClient(running.url) as client:
        while True:
            for _ in range(JOBS):
                with contextlib.suppress(Exception):  # a refused job is no part of the measurement
                    jobs.append((await client.submit(JOBS_ENDPOINT, {"ms": [[MODEL_MS]]})).id)
            await asyncio.sleep(JOBS_EVERY_S)


async def _expire(running: Stack) -> None:
    """Send requests whose callers give up before the model has answered."""
    async with AsyncClient(running.url) as client:
        while True:
            with contextlib.suppress(Exception):
                await client.infer(ENDPOINT, {"ms": [[3 * MODEL_MS]]}, timeout_s=0.3)
            await asyncio.sleep(2.0)


def _arguments() -> argparse.Namespace:
    return options.parser(__doc__, seconds=3600).parse_args()


if __name__ == "__main__":
    session.run(main)
