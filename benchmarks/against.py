"""``python -m benchmarks.against REVISION``: compare the speed of this checkout with another revision.

Both stacks run all the time, each from its own checkout with its own packages. wrk loads them alternately, so
a slow minute of the machine affects both. The table has the medians of the rounds. The ratio is computed in
each round, before the median, so that effects on both cancel out.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import load, options, places, report, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.load import Figures
from benchmarks.model import ensure_digits
from benchmarks.stack import Stack

WORKLOAD: workloads.Name = "digits"
BAR = 0.97


@dataclass(frozen=True, slots=True)
class Pair:
    """One round at one number of connections: this checkout, and the other revision."""

    connections: int
    ours: Figures
    theirs: Figures

    @property
    def ratio(self) -> float:
        """The ratio of the requests per second: this checkout to the other."""
        return self.ours.rate / self.theirs.rate


def main() -> int:
    """Measure, print the table, write against.json. Return 1 if this checkout is more than 3 % slower."""
    parser = options.parser(__doc__, seconds=5, repeats=7)
    parser.add_argument("revision", help="git revision to compare with")
    parser.add_argument("--concurrency", type=options.numbers, default=[64], help="connections (default: 64)")
    chosen = parser.parse_args()
    machine = report.machine()
    with session.session():
        ensure_digits()
        with (
            checkout(chosen.revision) as other,
            stack.tidegate("against-ours") as ours,
            stack.tidegate("against-theirs", root=other) as theirs,
        ):
            for each in (ours, theirs):
                each.deploy(workloads.onnx_model(), WORKLOAD)
            pairs = list(rounds(ours, theirs, chosen))
    return conclude(pairs, machine, chosen)


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """Check out a revision into its own folder, and install its packages. Raise BenchmarkFailed."""
    folder = places.bench_dir() / "checkout"
    shutil.rmtree(folder, ignore_errors=True)
    _run("git", "worktree", "prune")
    _run("git", "worktree", "add", "--detach", str(folder), revision)
    try:
        print(f"installing the packages of {revision} (about half a minute)", flush=True)
        _run("make", "-C", str(folder), "bootstrap")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _run("git", "worktree", "prune")


def rounds(ours: Stack, theirs: Stack, chosen: Any) -> Iterator[Pair]:
    """Yield every round. The first of the two stacks alternates."""
    exchange = workloads.exchange(WORKLOAD, "oip")
    for number in range(chosen.repeats):
        for connections in chosen.concurrency:
            found: dict[str, Figures] = {}
            for each in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                load.warm(each.url, exchange, connections)
                found[each.url] = load.measure(each.url, exchange, connections, chosen.seconds)
            pair = Pair(connections, found[ours.url], found[theirs.url])
            print(
                f"round {number + 1}, {connections} connections: {pair.ours.rate:,.0f} beside "
                f"{pair.theirs.rate:,.0f} requests/s, {pair.ratio:.3f}x",
                flush=True,
            )
            yield pair


def conclude(pairs: list[Pair], machine: dict[str, Any], chosen: Any) -> int:
    """Print and write the results. Return 1 if the bar is missed or an answer was wrong."""
    missed = False
    for connections in chosen.concurrency:
        mine = [pair for pair in pairs if pair.connections == connections]
        ratio = median(pair.ratio for pair in mine)
        wrong = sum(pair.ours.errors + pair.theirs.errors for pair in mine)
        missed |= ratio < BAR or wrong > 0
        for title, figures in (
            ("this checkout", [pair.ours for pair in mine]),
            (chosen.revision, [pair.theirs for pair in mine]),
        ):
            rate, p50, p99 = (
                median(getattr(each, name) for each in figures) for name in ("rate", "p50_ms", "p99_ms")
            )
            print(
                f"{title:>16}, {connections} connections: {rate:,.0f} requests/s, "
                f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"
            )
        print(f"{'PASS' if ratio >= BAR and not wrong else 'MISS'}  {ratio:.3f}x, wrong answers: {wrong}")
    found = [
        {"connections": pair.connections, "ours": pair.ours.to_json(), "theirs": pair.theirs.to_json()}
        for pair in pairs
    ]
    report.write_json(
        chosen.out / "against.json", {"machine": machine, "revision": chosen.revision, "rounds": found}
    )
    return 1 if missed else 0


def _run(*command: str) -> None:
    done = subprocess.run(
        command, cwd=places.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise BenchmarkFailed(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()[-1500:]}")


if __name__ == "__main__":
    session.run(main)
