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
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options, report, session, stack
from tidegate import AsyncClient
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.tasks import TaskSet

MODEL = stack.MODELS / "canary" / "model.py"
ENDED = ("promoted", "rolled_back", "aborted", "paused")
BASE_MS = 10.0
ONE = {"x": np.ones(1, np.float32)}
# Seconds of traffic before a rollout starts.
WARM_S = 3.0


@dataclass(frozen=True, slots=True)
class Case:
    """A canary: the environment of its version, the rollout's options, and how it must end."""

    name: str
    env: tuple[str, ...]
    steps: str
    hold: str
    ends: str


SAME_TIME = ("--env", f"CANARY_MS={BASE_MS}")
CASES = (
    Case("equal", SAME_TIME, "10,50,100", "10s", "promoted"),
    Case("errors", (*SAME_TIME, "--env", "CANARY_FAILS=0.03"), "5,50,100", "45s", "rolled_back"),
    Case("slower", ("--env", f"CANARY_MS={BASE_MS * 1.3}"), "5,50,100", "45s", "rolled_back"),
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
    errors: list[str]
    evidence: dict[str, dict[str, Any]]
    right: bool

    def lines(self) -> str:
        """Return the outcome and its evidence for the screen."""
        told = [
            f"{'PASS' if self.right else 'MISS'}  {self.name}: {self.phase} after {self.seconds:.0f} s and "
            f"{self.canary_requests:,} canary requests of {self.requests:,} ({self.failed} failed)",
            f"      {self.reason}",
        ]
        for metric, each in self.evidence.items():
            told.append(
                f"      {metric:<18} canary {each['canary_rate']:7.2%} of {each['canary']:<6} baseline "
                f"{each['base_rate']:7.2%} of {each['base']:<6} e-value of harm {each['e_worse']:.3g} (limit "
                f"{each['roll_back_at']:.3g}), of no harm {each['e_fine']:.3g} (limit {each['fine_at']:.3g})"
            )
        return "\n".join([*told, *(f"      a failed request: {error}" for error in self.errors)])


class Load:
    """Requests to one model at a mean rate. ``errors``: the messages of failed requests, and how many."""

    def __init__(self, url: str, model: str, rate: float) -> None:
        self.sent = 0
        self.errors: Counter[str] = Counter()
        self._url, self._model, self._rate = url, model, rate
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End :meth:`run`."""
        self._stop.set()

    async def run(self) -> None:
        """Send requests until :meth:`stop`. Raise TidegateError if the first request fails."""
        pending = TaskSet()
        async with AsyncClient(self._url, timeout_s=30) as client:
            await client.infer(self._model, ONE)
            while not self._stop.is_set():
                pending.start(self._send(client))
                await asyncio.sleep(random.expovariate(self._rate))
            await asyncio.gather(*pending)

    async def _send(self, client: AsyncClient) -> None:
        self.sent += 1
        try:
            await client.infer(self._model, ONE)
        except TidegateError as error:
            self.errors[f"{error.reason}: {error.message}"[:200]] += 1


async def until_ended(running: stack.Stack, name: str, limit_s: float) -> dict[str, Any]:
    """Return the rollout when it has ended, or as it is after ``limit_s`` seconds."""
    until = time.monotonic() + limit_s
    while True:
        found: dict[str, Any] = json.loads(
            await asyncio.to_thread(running.command, "rollout", name, "--json")
        )
        if found["rollout"]["phase"] in ENDED or time.monotonic() > until:
            return found
        await asyncio.sleep(2.0)


async def rollout(running: stack.Stack, case: Case, rate: float, limit_s: float, out: Path) -> Outcome:
    """Run one rollout under load, draw it, and return its outcome."""
    name = f"canary-{case.name}"
    _deploy(running, case, name)
    load = Load(running.url, name, rate)
    flow = asyncio.create_task(load.run())
    done, _ = await asyncio.wait([flow], timeout=WARM_S)
    if done:
        flow.result()
    began = time.monotonic()
    await asyncio.to_thread(
        running.command, "rollout", name, "--to", "v2", "--steps", case.steps, "--hold", case.hold,
        "--min-samples", "50",
    )  # fmt: skip
    found = await until_ended(running, name, limit_s)
    seconds = time.monotonic() - began
    load.stop()
    await flow
    running.command("rollout", name, "--plot", str(out / f"canary-{case.name}.svg"))
    running.command("delete", name, "--yes")
    ended, evidence = found["rollout"], found.get("evidence", {})
    canary = max((each["canary"] for each in evidence.values()), default=0)
    right = ended["phase"] == case.ends and (case.ends == "rolled_back" or not load.errors)
    errors = [f"{count} x {message}" for message, count in load.errors.most_common(3)]
    return Outcome(
        case.name, ended["phase"], ended["reason"], seconds, load.sent, canary, load.errors.total(), errors,
        evidence, right,
    )  # fmt: skip


def _deploy(running: stack.Stack, case: Case, name: str) -> None:
    """Serve version 1, and start version 2 without traffic."""
    running.deploy(MODEL, name, *SAME_TIME, "--instances", "4")
    with tempfile.TemporaryDirectory() as folder:
        # A different file, because the same file would be the same version.
        other = Path(folder) / "model.py"
        other.write_text(f"{MODEL.read_text()}# {case.name}\n")
        signature = str(MODEL.with_name("signature.json"))
        running.command(
            *("deploy", str(other), "--name", name, "--signature", signature, "--no-traffic"), *case.env
        )


def main() -> int:
    """Run, print, write canaries.json and the pictures. Return 1 if a canary ended wrongly."""
    chosen = _arguments()
    pictures: Path = chosen.pictures or chosen.out
    for folder in (chosen.out, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    machine = report.machine()
    outcomes = []
    with session.session(), stack.tidegate("canaries") as running:
        for case in CASES:
            outcomes.append(asyncio.run(rollout(running, case, chosen.rate, chosen.limit, pictures)))
            print(outcomes[-1].lines(), flush=True)
    print(report.machine_line(machine))
    out: Path = chosen.out / "canaries.json"
    report.write_json(out, {"machine": machine, "outcomes": [asdict(outcome) for outcome in outcomes]})
    print(f"Results: {out.parent}, pictures: {pictures}")
    return 0 if all(outcome.right for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--rate", type=float, default=60.0, help="requests per second (default: 60)")
    parser.add_argument(
        "--limit", type=float, default=150.0, help="longest time of a rollout in seconds (default: 150)"
    )
    parser.add_argument(
        "--pictures", type=Path, help="folder for the pictures (default: that of the results)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
