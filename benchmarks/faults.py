"""Inject five faults into a running stack, and diagnose each: ``python -m benchmarks.faults``.

Five endpoints get steady traffic. After a while, one after the other has a fault: callers leave, a slow
version is deployed, an operator starts too many replicas, one replica stalls, and more requests arrive than
its replicas can answer. `tidegate diagnose` must name each fault within two minutes, with its cause and its
remedy, and nothing else. Before that, a clean run must have no finding.

Days are 20 s here (``TIDEGATE_WATCH_DAY_S``), and a diagnosis compares the last 30 s with the ten minutes
before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import options, report, session, stack
from tidegate.kernel.tasks import TaskSet

MODEL = stack.MODELS / "faults" / "model.py"
SIGNATURE = ("--signature", str(MODEL.with_name("signature.json")))
STALLING = 1000.0  # the process of the model that gets this number stalls: see its file
DAY_S = 20
SETTINGS = {"TIDEGATE_WATCH_DAY_S": str(DAY_S), "TIDEGATE_WATCH_INTERVAL_S": "2"}
WINDOW = ("--window", "30s", "--past", "10m", "--days", "2")
LIMIT_S = 120.0
POLL_S = 4.0
CALLERS, LOYAL = 30, 6
OVERLOAD = 12.0

Endpoint = str


@dataclass(slots=True)
class Traffic:
    """Steady traffic of one endpoint, whose rate and callers a fault may change."""

    endpoint: Endpoint
    rate: float
    keys: Sequence[str]
    sent: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one endpoint, and how it must be named: symptom, and patterns of cause and command."""

    name: str
    endpoint: Endpoint
    symptom: str
    cause: str
    command: str
    inject: Callable[[World], Awaitable[None]]


@dataclass(slots=True)
class Outcome:
    """The outcome of a fault: its first finding, and others that had no reason."""

    name: str
    seconds: float | None = None
    found: dict[str, Any] | None = None
    wrong: list[dict[str, Any]] = field(default_factory=list)
    false: list[dict[str, Any]] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Return True if the fault was named rightly in time, and nothing else was named."""
        return self.seconds is not None and not self.wrong and not self.false

    def lines(self) -> str:
        """Return the outcome for the screen."""
        head = f"{'PASS' if self.met else 'MISS'}  {self.name}"
        if self.found is not None and self.seconds is not None:
            told = f": {self.found['title']} ({self.found['cause']}) after {self.seconds:.0f} s"
            text = [head + told, *(f"      {each}" for each in self.found["evidence"])]
            text.append(f"      next: {self.found['remedy']['command']}")
        else:
            text = [head + (": not named in time" if self.name != "clean" else ": no finding")]
        for kind, items in (("named wrongly", self.wrong), ("false", self.false)):
            text += [
                f"      {kind}: {each['endpoint']}: {each['title']} ({each['cause']}): {each['evidence'][0]}"
                for each in items
            ]
        return "\n".join(text)


class World:
    """The stack with its endpoints and their traffic."""

    def __init__(self, running: stack.Stack, rate: float) -> None:
        self.running = running
        self.traffic = {
            name: Traffic(name, rate, ()) for name in ("leaving", "slow", "oversized", "stalled", "overload")
        }
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def command(self, *arguments: str) -> str:
        """Run a command of the stack."""
        return await asyncio.to_thread(self.running.command, *arguments)

    async def serve(self) -> None:
        """Deploy the endpoints, and start their traffic."""
        for name, low, high, ms in (
            ("leaving", 1, 1, 5), ("slow", 1, 1, 10), ("oversized", 1, 4, 10), ("stalled", 3, 3, 10),
            ("overload", 1, 1, 30),
        ):  # fmt: skip
            await self.command(
                "deploy", str(MODEL), "--name", name, *SIGNATURE, "--env", f"FAULTS_MS={ms}",
                "--min", str(low), "--max", str(high),
            )  # fmt: skip
        self.traffic["leaving"].keys = await self._keys()
        for each in self.traffic.values():
            self._tasks.append(asyncio.create_task(self._send_all(each)))

    async def end(self) -> None:
        """Stop the traffic."""
        self._stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def diagnose(self) -> list[dict[str, Any]]:
        """Return the findings of `tidegate diagnose` now."""
        found: list[dict[str, Any]] = json.loads(await self.command("diagnose", *WINDOW, "--json"))["items"]
        return found

    async def learned(self, days: int) -> bool:
        """Return True if every endpoint has a past."""
        states = json.loads(await self.command("diagnose", *WINDOW, "--json"))["endpoints"]
        return all(each["state"] != "learning" and each["days"] >= days for each in states)

    def _url(self, endpoint: Endpoint) -> str:
        return f"{self.running.url}/v2/models/{endpoint}/infer"

    async def _keys(self) -> list[str]:
        made = []
        for number in range(CALLERS):
            text = await self.command("keys", "create", f"caller-{number}", "--scope", "infer", "--json")
            made.append(json.loads(text)["key"])
        return made

    async def _send_all(self, traffic: Traffic) -> None:
        pending = TaskSet()
        url = self._url(traffic.endpoint)
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(timeout=30, limits=limits, trust_env=False) as client:
            while not self._stop.is_set():
                pending.start(self._send(client, url, traffic))
                await asyncio.sleep(random.expovariate(traffic.rate))

    async def _send(self, client: httpx.AsyncClient, url: str, traffic: Traffic) -> None:
        traffic.sent += 1
        headers = {"X-Request-Timeout-Ms": "2000"}
        if traffic.keys:
            headers["Authorization"] = f"Bearer {random.choice(traffic.keys)}"
        try:
            answer = await client.post(url, json=request(1.0), headers=headers)
            traffic.failed += answer.status_code != 200
        except httpx.HTTPError:
            traffic.failed += 1

    # --- the faults -------------------------------------------------------------------------------------

    async def callers_leave(self) -> None:
        """Keep only some of the callers."""
        traffic = self.traffic["leaving"]
        traffic.keys = traffic.keys[:LOYAL]
        traffic.rate *= LOYAL / CALLERS

    async def slow_model(self) -> None:
        """Deploy a version that takes four times as long."""
        with tempfile.TemporaryDirectory() as folder:
            other = Path(folder) / "model.py"
            other.write_text(f"{MODEL.read_text()}# slow\n")
            await self.command("deploy", str(other), "--name", "slow", *SIGNATURE, "--env", "FAULTS_MS=40")

    async def oversized_replicas(self) -> None:
        """Start four replicas, as an operator may do it before an event and then forget it."""
        await self.command("scale", "oversized", "4")

    async def stalled_replica(self) -> None:
        """Send the request after which one replica takes much longer for each call."""
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            answer = await client.post(self._url("stalled"), json=request(STALLING))
            answer.raise_for_status()

    async def too_many_requests(self) -> None:
        """Send more requests than one replica can answer."""
        self.traffic["overload"].rate *= OVERLOAD


def request(value: float) -> dict[str, Any]:
    """Return the body of a request."""
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [value]}]}


FAULTS = (
    Fault("callers leave", "leaving", "adoption_falls", "fewer callers",
          r"tidegate usage --by day,principal --endpoint leaving", World.callers_leave),
    Fault("slow model", "slow", "feels_slow", "model", "tidegate rollback slow", World.slow_model),
    Fault("oversized replicas", "oversized", "cost_grows", "too many replicas",
          r"tidegate scale oversized\S* --auto", World.oversized_replicas),
    Fault("stalled replica", "stalled", "inconsistent_times", r"replica stalled\S+",
          r"tidegate drain stalled\S+", World.stalled_replica),
    Fault("overload", "overload", "errors_under_load", "too few replicas",
          r"tidegate policy overload\S* --set max_replicas=\d+", World.too_many_requests),
)  # fmt: skip


async def clean(world: World, seconds: float) -> Outcome:
    """Diagnose again and again without a fault. Every finding is false."""
    outcome, end = Outcome("clean", 0.0), time.monotonic() + seconds
    while time.monotonic() < end:
        outcome.false += await world.diagnose()
        await asyncio.sleep(POLL_S)
    return outcome


async def run_fault(world: World, fault: Fault, before: set[Endpoint]) -> Outcome:
    """Inject one fault, and wait until it is named. ``before``: endpoints that have a fault already."""
    outcome = Outcome(fault.name)
    await fault.inject(world)
    began = time.monotonic()
    while outcome.found is None and time.monotonic() - began < LIMIT_S:
        for each in await world.diagnose():
            if each["endpoint"] == fault.endpoint:
                if is_right(fault, each):
                    outcome.found, outcome.seconds = each, time.monotonic() - began
                else:
                    outcome.wrong.append(each)
            elif each["endpoint"] not in before:
                outcome.false.append(each)
        await asyncio.sleep(POLL_S)
    return outcome


def is_right(fault: Fault, found: dict[str, Any]) -> bool:
    """Return True if a finding names the fault with its cause and remedy."""
    return (
        found["symptom"] == fault.symptom
        and re.fullmatch(fault.cause, found["cause"]) is not None
        and re.match(fault.command, found["remedy"]["command"]) is not None
    )


async def measure(world: World, faults: Sequence[Fault], clean_s: float) -> list[Outcome]:
    """Return the outcomes of the clean run and of the faults."""
    await world.serve()
    try:
        while not await world.learned(days=5):
            await asyncio.sleep(POLL_S)
        outcomes = [await clean(world, clean_s)]
        print(outcomes[0].lines(), flush=True)
        done: set[Endpoint] = set()
        for fault in faults:
            outcomes.append(await run_fault(world, fault, done))
            done.add(fault.endpoint)
            print(outcomes[-1].lines(), flush=True)
    finally:
        await world.end()
    for each in world.traffic.values():
        print(f"      {each.endpoint}: {each.sent:,} requests, {each.failed:,} failed")
    return outcomes


def main() -> int:
    """Run, print, and write faults.json. Return 1 if a fault was not named, or something else was."""
    chosen = _arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    machine = report.machine()
    faults = [each for each in FAULTS if not chosen.only or each.endpoint in chosen.only]
    with session.session(), stack.tidegate("faults", SETTINGS) as running:
        outcomes = asyncio.run(measure(World(running, chosen.rate), faults, chosen.clean))
    print(report.machine_line(machine))
    out: Path = chosen.out / "faults.json"
    report.write_json(out, {"machine": machine, "outcomes": [asdict(each) for each in outcomes]})
    print(f"Results: {out}")
    return 0 if all(each.met for each in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument(
        "--rate", type=float, default=12.0, help="requests per second and endpoint (default: 12)"
    )
    parser.add_argument(
        "--clean", type=float, default=1200.0, help="seconds without a fault (default: 1200; short form: 60)"
    )
    names = options.names([each.endpoint for each in FAULTS])
    parser.add_argument("--only", type=names, default=[], help="faults of these endpoints, by comma")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
