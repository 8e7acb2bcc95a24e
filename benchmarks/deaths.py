"""Count failed calls while the model's process dies again and again: ``python -m benchmarks.deaths``.

The process is killed with -9 every few seconds while callers send requests without a pause: first with two
replicas, which are killed alternately, then with one. No request may fail. With ``retry: never``, only
requests in the killed process may fail, and their errors must explain it. Then 50 requests are sent together,
and one of them ends the process that runs it, several times. The other 49 must be answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks import options, report, session, stack
from benchmarks.watch import watching
from tidegate import AsyncClient
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError

MODEL = stack.MODELS / "deaths" / "model.py"
SETTINGS = ("--env", "DEATHS_MODEL_MS=20")
# The model ends its process at this input: see its file.
EXIT = 1000.0
TOGETHER, GUILTY = 50, 23
LIMIT_S = 240.0
LOOK_S = 0.02
TOLD = "the model's process ended"


@dataclass(frozen=True, slots=True)
class Worker:
    """The process of a replica, and its health port."""

    pid: int
    port: int

    def model_processes(self) -> list[int]:
        """Return the pids of the Python processes of its model; none while it is dead."""
        with suppress(psutil.Error):
            below = psutil.Process(self.pid).children(recursive=True)
            # The kernel stores 15 bytes of a process's name; psutil may return the complete name.
            return [p.pid for p in below if p.name().startswith("triton_python_b") and _lives(p)]
        return []


def _lives(process: psutil.Process) -> bool:
    return bool(process.status() != psutil.STATUS_ZOMBIE)


@dataclass(slots=True)
class Outcome:
    """The outcome of the requests. ``back_s``: the seconds from each kill until the replica was ready."""

    name: str
    sent: int = 0
    right: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    unexplained: int = 0
    kills: int = 0
    longest_s: float = 0.0
    back_s: list[float] = field(default_factory=list)
    allowed: int = 0
    seconds: float = 0.0

    @property
    def met(self) -> bool:
        """Return True if only allowed requests failed, and each failure was explained."""
        return not self.wrong and not self.unexplained and len(self.failures) <= self.allowed

    def line(self) -> str:
        """Return the outcome for the screen."""
        back = sorted(self.back_s)
        ready = f"; ready again after {back[len(back) // 2]:.2f} s, {back[-1]:.2f} s at most" if back else ""
        deaths = f"{self.kills} kills, " if self.kills else ""
        told = f" ({self.failures[0]})" if self.failures else ""
        return (
            f"{'PASS' if self.met else 'MISS'}  {self.name}: {deaths}{self.sent:,} requests, "
            f"{len(self.failures)} failed{told}, {self.wrong} wrong; longest {self.longest_s:.2f} s{ready}"
        )

    def add(self, value: float, answer: float | str, took_s: float) -> None:
        """Count a request and its answer, or the message of its failure."""
        self.sent += 1
        self.longest_s = max(self.longest_s, took_s)
        if isinstance(answer, str):
            self.failures.append(answer)
            self.unexplained += TOLD not in answer
        elif answer == 2 * value:
            self.right += 1
        else:
            self.wrong += 1


async def under_kills(
    url: str,
    model: str,
    workers: Sequence[Worker],
    *,
    seconds: float,
    every_s: float,
    callers: int = 16,
    never: bool = False,
    at_least: int = 0,
) -> Outcome:
    """Kill the model's process of one worker after the other while callers send requests.

    Continue after ``seconds`` until there were ``at_least`` kills.
    """
    outcome = Outcome(f"{len(workers)} replica(s), kill -9 every {every_s:g} s{', retry: never' * never}")
    begun = time.monotonic()

    async def call(number: int) -> None:
        value = float(number)
        while time.monotonic() - begun < seconds or len(outcome.back_s) < at_least:
            value = (value + callers) % 900
            await _ask(client, model, value, outcome)

    async with AsyncClient(url, timeout_s=LIMIT_S) as client:
        killing = asyncio.create_task(_kill(workers, outcome, begun, seconds, every_s, at_least))
        try:
            await asyncio.gather(*(call(number) for number in range(callers)))
            await killing
        finally:
            await tasks.end(killing)
    outcome.seconds = time.monotonic() - begun
    # A killed process has the request that it runs, and further requests that Triton has sent to it.
    outcome.allowed = outcome.kills * callers if never else 0
    return outcome


async def _kill(
    workers: Sequence[Worker],
    outcome: Outcome,
    begun: float,
    seconds: float,
    every_s: float,
    at_least: int,
) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as http:
        # At fixed times, but not before the replica is ready again.
        while True:
            at = every_s * (1 + (time.monotonic() - begun) // every_s)
            if at >= seconds and outcome.kills >= at_least:
                return
            await asyncio.sleep(begun + at - time.monotonic())
            worker = workers[outcome.kills % len(workers)]
            dead = await _living(worker)
            for pid in dead:
                os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            outcome.kills += 1
            while set(await _living(worker)) & set(dead) or not await _ready(http, worker):
                if time.monotonic() - killed > LIMIT_S:
                    raise TimeoutError(f"not ready {LIMIT_S:g} s after its model's process was killed")
                await asyncio.sleep(LOOK_S)
            outcome.back_s.append(time.monotonic() - killed)


async def _living(worker: Worker) -> list[int]:
    while not (found := await asyncio.to_thread(worker.model_processes)):
        await asyncio.sleep(LOOK_S)
    return found


async def _ready(http: httpx.AsyncClient, worker: Worker) -> bool:
    with suppress(httpx.HTTPError):
        return (await http.get(f"http://127.0.0.1:{worker.port}/health/ready")).status_code == 200
    return False


async def with_a_guilty_one(url: str, model: str, rounds: int) -> Outcome:
    """Send 50 requests together, one of which ends the process that runs it. Repeat ``rounds`` times."""
    outcome = Outcome(f"{rounds} x {TOGETHER} requests, one of which calls os._exit(7)", allowed=rounds)
    begun = time.monotonic()
    async with AsyncClient(url, timeout_s=LIMIT_S) as client:
        for _ in range(rounds):
            values = [EXIT if n == GUILTY else float(n) for n in range(TOGETHER)]
            await asyncio.gather(*(_ask(client, model, value, outcome) for value in values))
    outcome.seconds = time.monotonic() - begun
    outcome.unexplained += sum("exit code 7" not in failure for failure in outcome.failures)
    return outcome


async def _ask(client: AsyncClient, model: str, value: float, outcome: Outcome) -> None:
    began = time.monotonic()
    answer: float | str
    try:
        found = await client.infer(model, {"x": np.array([[value]], "<f4")})
        answer = float(found["y"][0, 0])
    except TidegateError as error:
        answer = f"{error.reason}: {error.message}"
    outcome.add(value, answer, time.monotonic() - began)


def main() -> int:
    """Run, print, write deaths.json. Return 1 if a request failed that must not fail."""
    chosen = _arguments()
    machine = report.machine()
    outcomes: list[Outcome] = []
    with session.session(), stack.tidegate("deaths") as running:
        for replicas, never in ((2, False), (1, False), (1, True)):
            name = f"deaths-{replicas}{'-never' * never}"
            running.deploy(MODEL, name, *SETTINGS, replicas=replicas)
            if never:
                forbid_retries(running, f"{name}-v1")
            workers = asyncio.run(workers_of(running, f"{name}-v1", replicas))
            outcomes.append(
                asyncio.run(
                    under_kills(
                        running.url,
                        name,
                        workers,
                        seconds=chosen.seconds,
                        every_s=chosen.every,
                        callers=chosen.callers,
                        never=never,
                    )
                )
            )
            print(outcomes[-1].line(), flush=True)
            running.command("delete", name, "--yes")
        running.deploy(MODEL, "deaths-exit", *SETTINGS)
        outcomes.append(asyncio.run(with_a_guilty_one(running.url, "deaths-exit", chosen.rounds)))
        print(outcomes[-1].line(), flush=True)
    print(report.machine_line(machine))
    out: Path = chosen.out / "deaths.json"
    report.write_json(out, {"machine": machine, "outcomes": [asdict(outcome) for outcome in outcomes]})
    print(f"Results: {out}")
    return 0 if all(outcome.met for outcome in outcomes) else 1


def forbid_retries(running: stack.Stack, deployment: str) -> None:
    """Set ``retry: never`` on a Deployment, and wait until the gateway knows it."""
    token = (running.state / "token").read_text().strip()
    url = f"http://127.0.0.1:{running.env['TIDEGATE_REGISTRY_PORT']}/v1/deployments/{deployment}"
    headers = {"Authorization": f"Bearer {token}"}
    httpx.patch(url, json={"retry": "never"}, headers=headers, trust_env=False).raise_for_status()
    until = time.monotonic() + LIMIT_S
    while json.loads(running.command("routes", "--json"))["deployments"][deployment]["retry"] != "never":
        if time.monotonic() > until:
            raise TimeoutError(f"{deployment} does not have retry: never after {LIMIT_S:g} s")
        time.sleep(0.5)


async def workers_of(running: stack.Stack, deployment: str, count: int) -> list[Worker]:
    """Wait until this number of workers of a Deployment is ready. Return them."""
    async with watching(running, deployment) as watch:
        await watch.until_ready(count, LIMIT_S)
        found: list[dict[str, Any]] = watch.status["replicas"]
    return [Worker(each["pid"], each["metrics_port"]) for each in found]


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=120)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills (default: 5)")
    parser.add_argument("--callers", type=int, default=16, help="callers at the same time (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds with os._exit (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
