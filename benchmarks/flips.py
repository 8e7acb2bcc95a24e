"""Flip weights under load while a version is added and removed: ``python -m benchmarks.flips``.

Callers send requests all the time. Meanwhile the weights of two versions change 100 times. After every tenth
change, a third version is started, gets traffic, and is deleted. No request may fail, and each answer must
come from a version that had traffic.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import options, report, session, stack
from benchmarks.client import Client

MODEL = stack.EXAMPLES / "identity" / "model.py"
SIGNATURE = str(MODEL.with_name("signature.json"))
NAME = "flips"
PATH = f"/v2/models/{NAME}/infer"
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
).encode()
FLIPS = (("v1=1", "v2=99"), ("v1=99", "v2=1"), ("v1=100",), ("v2=100",), ("v1=50", "v2=50"))


@dataclass(slots=True)
class Outcome:
    """The changes, the requests by version, and the failed ones by their message."""

    flips: int = 0
    added: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """Return the outcome for the screen."""
        parts = ", ".join(f"v{version} {count:,}" for version, count in sorted(self.counts.items()))
        return (
            f"{'MISS' if self.failed else 'PASS'}  {self.flips} changes of the weights, a version added and "
            f"removed {self.added} times, {self.counts.total():,} answers ({parts}): "
            f"{self.failed.total()} failed requests"
        )


async def caller(port: int, outcome: Outcome, ended: Callable[[], bool]) -> None:
    """Send requests one after the other until ``ended``."""
    client = Client(port)
    while not ended():
        try:
            answer = await client.post(PATH, BODY, {})
        except (OSError, EOFError) as error:
            outcome.failed[repr(error)] += 1
            continue
        if answer.status == 200:
            outcome.counts[str(json.loads(answer.body)["model_version"])] += 1
        else:
            outcome.failed[f"{answer.status}: {answer.body.decode()[:200]}"] += 1
    client.close()


def deploy(running: stack.Stack, version: int, *extra: str) -> None:
    """Register and start a version of the identity model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.py"
        path.write_text(f"{MODEL.read_text()}# {version}\n")
        scale = ("--min", "1", "--max", "1")
        running.command("deploy", str(path), "--name", NAME, "--signature", SIGNATURE, *scale, *extra)


def flip(running: stack.Stack, changes: int, outcome: Outcome) -> None:
    """Change the weights; after every tenth change, add a version and remove it."""
    for turn in range(changes):
        running.command("split", NAME, *FLIPS[turn % len(FLIPS)])
        outcome.flips += 1
        if turn % 10 == 9:
            running.command("deploy", NAME, "--version", "3", "--no-traffic")
            running.command("split", NAME, "v1=40", "v2=40", "v3=20")
            running.command("split", NAME, "v1=50", "v2=50")
            running.command("delete", f"{NAME}-v3", "--deployment", "--yes")
            outcome.added += 1


async def measure(running: stack.Stack, chosen: argparse.Namespace) -> Outcome:
    """Run the callers until all changes are made."""
    outcome = Outcome()
    work = asyncio.create_task(asyncio.to_thread(flip, running, chosen.flips, outcome))
    callers = (caller(running.gateway_port, outcome, work.done) for _ in range(chosen.callers))
    await asyncio.gather(work, *callers)
    return outcome


def main() -> int:
    """Run, print, write flips.json. Return 1 if a request failed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("flips", {"TIDEGATE_GATEWAY_WORKERS": "2"}) as running:
        deploy(running, 1)
        deploy(running, 2, "--no-traffic")
        deploy(running, 3, "--no-traffic")
        outcome = asyncio.run(measure(running, chosen))
    print(outcome.line())
    for message, count in outcome.failed.most_common(5):
        print(f"      {count} x {message}")
    print(report.machine_line(machine))
    chosen.out.mkdir(parents=True, exist_ok=True)
    told = {"flips": outcome.flips, "added": outcome.added, "counts": dict(outcome.counts)}
    told["failed"] = dict(outcome.failed)
    report.write_json(chosen.out / "flips.json", {"machine": machine, "outcome": told})
    return 1 if outcome.failed else 0


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--flips", type=int, default=100, help="changes of the weights (default: 100)")
    parser.add_argument("--callers", type=int, default=8, help="at the same time (default: 8)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
