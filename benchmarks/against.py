"""``python -m benchmarks.against REVISION``: compare the speed of this checkout with another revision.

Both stacks run all the time, each from its own checkout with its own packages. wrk loads them alternately, so
a slow minute of the machine affects both. The table has the medians of the rounds. The ratio is computed in
each round, before the median, so that effects on both cancel out. The CPU time per request of each part of
the stack depends less on what else runs on the machine.
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

from benchmarks import cpu, load, options, places, report, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.load import Figures
from benchmarks.model import ensure_digits
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange
from tidegate.stack import processes
from tidegate.stack.processes import Process

WORKLOAD: workloads.Name = "digits"
BAR = 0.97


@dataclass(frozen=True, slots=True)
class Pair:
    """One round at one number of connections: this checkout, and the other revision."""

    connections: int
    ours: Figures
    theirs: Figures
    ours_us: dict[str, float]
    theirs_us: dict[str, float]

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
            found: dict[str, tuple[Figures, dict[str, float]]] = {}
            for each in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                load.warm(each.url, exchange, connections)
                found[each.url] = measure(each, exchange, connections, chosen.seconds)
            (mine, mine_us), (other, other_us) = found[ours.url], found[theirs.url]
            pair = Pair(connections, mine, other, mine_us, other_us)
            print(
                f"round {number + 1}, {connections} connections: {pair.ours.rate:,.0f} beside "
                f"{pair.theirs.rate:,.0f} requests/s, {pair.ratio:.3f}x",
                flush=True,
            )
            yield pair


def measure(
    stack: Stack, exchange: Exchange, connections: int, seconds: int
) -> tuple[Figures, dict[str, float]]:
    """Return the figures of a run, and the CPU time (us) per request of each part of the stack."""
    members = processes_of(stack)
    before = cpu.usage(members)
    figures = load.measure(stack.url, exchange, connections, seconds)
    used = cpu.usage(members).since(before)
    requests = max(1.0, figures.rate * seconds)
    return figures, {part: us / requests for part, us in used.items()}


def processes_of(stack: Stack) -> list[Process]:
    """Return the processes that run with this stack's state folder."""
    state = str(stack.state)
    pids = (int(entry.name) for entry in processes.PROC.iterdir() if entry.name.isdigit())
    found = (processes.find(pid) for pid in pids)
    return [each for each in found if each and state in f"{each.command(limit=None)} {each.environment()}"]


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
        for part in sorted({part for pair in mine for part in (*pair.ours_us, *pair.theirs_us)}):
            us, other_us = (
                median(each.get(part, 0.0) for each in side)
                for side in ([pair.ours_us for pair in mine], [pair.theirs_us for pair in mine])
            )
            print(f"{part:>16}: {us:6.1f} beside {other_us:6.1f} us of CPU per request")
        print(f"{'PASS' if ratio >= BAR and not wrong else 'MISS'}  {ratio:.3f}x, wrong answers: {wrong}")
    found = [
        {
            "connections": pair.connections,
            "ours": pair.ours.to_json() | {"cpu_us": pair.ours_us},
            "theirs": pair.theirs.to_json() | {"cpu_us": pair.theirs_us},
        }
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
