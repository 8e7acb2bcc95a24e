"""``python -m benchmarks.killer``: send 64 requests, one of which kills the process that runs it.

This killer first ends the model's process by a segmentation fault. Then Triton, and last the whole worker,
are killed from outside while the killer is in a call. Each time, only the killer may fail, and the other 63
requests must succeed. The same is done with 64 jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from benchmarks import options, report, session, stack
from tidegate import AsyncClient
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError

Victim = Literal["model", "triton", "worker"]
VICTIMS: tuple[Victim, ...] = ("model", "triton", "worker")
MODEL = stack.MODELS / "killer" / "model.py"
COUNT, KILLER = 64, 37
# The inputs at which the model dies or waits: see its file.
SEGFAULT, MARK, GATE = 1000, 2000, 3000
LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of the requests by outcome. ``kills``: how often the killer was in a call that died."""

    victim: Victim
    kind: str
    right: int
    wrong: int
    failed: list[int]
    kills: int
    seconds: float

    @property
    def met(self) -> bool:
        """Return True if only the killer failed."""
        return (self.right, self.wrong, self.failed) == (COUNT - 1, 0, [KILLER])

    def line(self) -> str:
        """Return the outcome for the screen."""
        return (
            f"{'PASS' if self.met else 'MISS'}  {COUNT} {self.kind}, one kills the {self.victim}: "
            f"{self.right} right, {self.wrong} wrong, {len(self.failed)} failed {self.failed}; "
            f"killed from outside {self.kills} times; {self.seconds:.1f} s"
        )


class Assassin:
    """Kills Triton or the worker whenever the model reports that it runs the killer."""

    def __init__(self, mark: Path, victim: Victim) -> None:
        self._mark = mark
        self._above = VICTIMS.index(victim)
        self.kills = 0

    async def run(self) -> None:
        """Wait for the killer and kill, until cancelled."""
        while True:
            with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
                model = psutil.Process(int(self._mark.read_text()))
                self._mark.unlink()
                model.parents()[self._above - 1].send_signal(signal.SIGKILL)
                self.kills += 1
            await asyncio.sleep(0.01)


async def held(url: str, model: str, victim: Victim, mark: Path, *, jobs: bool = False) -> Outcome:
    """Send the requests while the model is busy, so that they share a call. Return their outcomes."""
    assassin = Assassin(mark, victim)
    killing = None if victim == "model" else asyncio.create_task(assassin.run())
    killer = SEGFAULT if victim == "model" else MARK
    numbers = [float(killer if n == KILLER else n) for n in range(COUNT)]
    began = time.monotonic()
    try:
        async with AsyncClient(url, timeout_s=LIMIT_S) as client:
            gate = asyncio.create_task(_ask(client, model, float(GATE)))
            await asyncio.sleep(0.5)
            ask = _submit if jobs else _ask
            found = await asyncio.gather(*(ask(client, model, number) for number in numbers))
            await gate
    finally:
        await tasks.end(killing)
    right = sum(value == 2 * number for value, number in zip(found, numbers, strict=True))
    failed = [n for n, value in enumerate(found) if value is None]
    wrong = COUNT - right - len(failed)
    spent = time.monotonic() - began
    return Outcome(victim, "jobs" if jobs else "requests", right, wrong, failed, assassin.kills, spent)


async def _ask(client: AsyncClient, model: str, number: float) -> float | None:
    try:
        answer = await client.infer(model, {"x": np.array([[number]], "<f4")})
    except TidegateError:
        return None
    return float(answer["y"][0, 0])


async def _submit(client: AsyncClient, model: str, number: float) -> float | None:
    job = await client.submit(model, {"x": np.array([[number]], "<f4")})
    if await job.wait() != "succeeded":
        return None
    return float((await job.result())["y"][0, 0])


def main() -> int:
    """Run, print, write killer.json. Return 1 if any other request failed."""
    chosen = _arguments()
    machine = report.machine()
    outcomes: list[Outcome] = []
    # No sandbox: in it, the model could neither kill its worker nor write the file with its process id.
    setting = {"TIDEGATE_MODEL_SANDBOX": "off"}
    with session.session(), stack.tidegate("killer", setting) as running:
        for jobs in (False, True):
            for victim in chosen.victims:
                name = f"killer-{victim}-{'jobs' if jobs else 'requests'}"
                mark = running.state / f"mark-{name}"
                running.deploy(MODEL, name, "--env", f"KILLER_MARK={mark}")
                outcomes.append(asyncio.run(held(running.url, name, victim, mark, jobs=jobs)))
                print(outcomes[-1].line(), flush=True)
    print(report.machine_line(machine))
    document = {"machine": machine, "outcomes": [asdict(outcome) for outcome in outcomes]}
    report.write_json(chosen.out / "killer.json", document)
    return 0 if all(outcome.met for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    known = ",".join(VICTIMS)
    parser.add_argument("--victims", type=options.names(VICTIMS), default=list(VICTIMS), help=known)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
