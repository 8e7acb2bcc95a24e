"""Roll out three canaries on a real stack: ``python -m benchmarks.canaries``.

Each endpoint serves a model whose calls take a random time. Its canary is an equal version, one that fails
3 % of its requests, or one that takes 30 % longer. Requests arrive at a fixed rate (a Poisson process). The
equal version must be promoted; the others must be rolled back. A picture of each rollout is drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options, report, session, stack
from tidegate import AsyncClient
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.tasks import TaskSet

MODEL = stack.MODELS / "canary" / "model.py"
ENDED = ("promoted", "rolled_back", "aborted", "paused")
BASE_MS = 10.0


@dataclass(frozen=True, slots=True)
class Case:
    """A canary: the environment of its version, and how its rollout must end."""

    name: str
    env: tuple[str, ...]
    steps: str
    ends: str


SAME_TIME = ("--env", f"CANARY_MS={BASE_MS}")
CASES = (
    Case("equal", SAME_TIME, "10,50,100", "promoted"),
    Case("errors", (*SAME_TIME, "--env", "CANARY_FAILS=0.03"), "5,50,100", "rolled_back"),
    Case("slower", ("--env", f"CANARY_MS={BASE_MS * 1.3}"), "5,50,100", "rolled_back"),
)


@dataclass(slots=True)
class Outcome:
    """The end of a rollout: its phase, reason and seconds, all requests, and those of the canary."""

    name: str
    phase: str
    reason: str
    seconds: float
    requests: int
    canary_requests: int
    failed: int
    right: bool

    def line(self) -> str:
        """Return the outcome for the screen."""
        return (
            f"{'PASS' if self.right else 'MISS'}  {self.name}: {self.phase} after {self.seconds:.0f} s and "
            f"{self.canary_requests:,} canary requests of {self.requests:,} ({self.failed} failed): "
            f"{self.reason}"
        )


async def load(url: str, model: str, rate: float, stop: asyncio.Event, counts: list[int]) -> None:
    """Send requests at a mean rate until ``stop``; count requests and failures."""
    pending = TaskSet()
    x = np.ones((1, 1), np.float32)

    async def one(client: AsyncClient) -> None:
        counts[0] += 1
        with suppress(TidegateError):
            await client.infer(model, {"x": x})
            return
        counts[1] += 1

    async with AsyncClient(url, timeout_s=30) as client:
        while not stop.is_set():
            pending.start(one(client))
            await asyncio.sleep(random.expovariate(rate))
        await tasks.end(*pending)


async def until_ended(running: stack.Stack, name: str, limit_s: float) -> dict[str, Any]:
    """Return the rollout when it has ended, or as it is after ``limit_s`` seconds."""
    until = time.monotonic() + limit_s
    while True:
        found: dict[str, Any] = json.loads(
            await asyncio.to_thread(running.command, "rollout", name, "--json")
        )
        if found["rollout"]["phase"] in ENDED or time.monotonic() > until:
            return found
        await asyncio.sleep(1.0)


async def rollout(running: stack.Stack, case: Case, rate: float, limit_s: float, out: Path) -> Outcome:
    """Run one rollout under load, draw it, and return its outcome."""
    name = f"canary-{case.name}"
    running.deploy(MODEL, name, *SAME_TIME, "--instances", "4")
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # a different file, because the same file would be the same version
        other = Path(folder) / "model.py"
        other.write_text(f"{MODEL.read_text()}# {case.name}\n")
        signature = str(MODEL.with_name("signature.json"))
        running.command(
            *("deploy", str(other), "--name", name, "--signature", signature, "--no-traffic"), *case.env
        )
    stop, counts = asyncio.Event(), [0, 0]
    flow = asyncio.create_task(load(running.url, name, rate, stop, counts))
    await asyncio.sleep(3.0)
    began = time.monotonic()
    await asyncio.to_thread(
        running.command, "rollout", name, "--to", "v2", "--steps", case.steps, "--hold", "10s",
        "--min-samples", "50",
    )  # fmt: skip
    found = await until_ended(running, name, limit_s)
    seconds = time.monotonic() - began
    stop.set()
    await flow
    picture = out / f"canary-{case.name}.svg"
    running.command("rollout", name, "--plot", str(picture))
    running.command("delete", name, "--yes")
    ended = found["rollout"]
    canary = max((each["canary"] for each in found.get("evidence", {}).values()), default=0)
    right = ended["phase"] == case.ends
    return Outcome(case.name, ended["phase"], ended["reason"], seconds, counts[0], canary, counts[1], right)


def main() -> int:
    """Run, print, write canaries.json and the pictures. Return 1 if a canary ended wrongly."""
    chosen = _arguments()
    chosen.out.mkdir(parents=True, exist_ok=True)
    machine = report.machine()
    outcomes = []
    with session.session(), stack.tidegate("canaries") as running:
        for case in CASES:
            outcomes.append(asyncio.run(rollout(running, case, chosen.rate, chosen.limit, chosen.out)))
            print(outcomes[-1].line(), flush=True)
    print(report.machine_line(machine))
    out: Path = chosen.out / "canaries.json"
    report.write_json(out, {"machine": machine, "outcomes": [asdict(outcome) for outcome in outcomes]})
    print(f"Results and pictures: {out.parent}")
    return 0 if all(outcome.right for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second (default: 100)")
    parser.add_argument(
        "--limit", type=float, default=300.0, help="longest time of a rollout in seconds (default: 300)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
