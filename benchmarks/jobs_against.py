"""``python -m benchmarks.jobs_against REVISION``: compare jobs per second with another revision.

Both stacks run all the time, each from its own checkout with its own packages. In each round, wrk submits
jobs of the identity model to one stack for some seconds, and the benchmark waits until all are done. Then the
other stack follows. The first of the two alternates. The table has the medians of the rounds. The ratios are
computed in each round, before the median.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from benchmarks import cpu, jobs, options, report, session, stack
from benchmarks.against import BAR, checkout, processes_of
from benchmarks.stack import Stack

RATES: tuple[Literal["accepted", "done"], ...] = ("accepted", "done")


@dataclass(frozen=True, slots=True)
class Run:
    """The jobs of one stack in one round, and the CPU time (us) per job of each part of the stack."""

    jobs: jobs.Round
    cpu_us: dict[str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """One round: this checkout, and the other revision."""

    ours: Run
    theirs: Run

    def ratio(self, rate: Literal["accepted", "done"]) -> float:
        """Return the ratio of the jobs per second: this checkout to the other."""
        mine, other = getattr(self.ours.jobs, rate), getattr(self.theirs.jobs, rate)
        return float(mine / other) if other else 0.0


def main() -> int:
    """Measure, print the table, write the results. Return 1 if this checkout is more than 3 % slower."""
    parser = options.parser(__doc__, seconds=8, repeats=5)
    parser.add_argument("revision", help="git revision to compare with")
    parser.add_argument("--connections", type=int, default=128, help="concurrent connections (default: 128)")
    chosen = parser.parse_args()
    machine = report.machine()
    with (
        session.session(),
        checkout(chosen.revision) as other,
        stack.tidegate("jobs-ours") as ours,
        stack.tidegate("jobs-theirs", root=other) as theirs,
    ):
        for each in (ours, theirs):
            each.deploy(stack.EXAMPLES / "identity" / "model.py", "identity")
        pairs = list(rounds(ours, theirs, chosen))
    return conclude(pairs, machine, chosen)


def rounds(ours: Stack, theirs: Stack, chosen: Any) -> Iterator[Pair]:
    """Yield every round. Raise Incomplete if accepted jobs are not done."""
    for number in range(chosen.repeats):
        found: dict[str, Run] = {}
        for each in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            found[each.url] = measure(each, chosen.connections, chosen.seconds)
        pair = Pair(found[ours.url], found[theirs.url])
        ratios = ", ".join(f"{rate} {pair.ratio(rate):.3f}x" for rate in RATES)
        print(f"round {number + 1}: {ratios}; {jobs.line(pair.ours.jobs)}", flush=True)
        yield pair


def measure(running: Stack, connections: int, seconds: int) -> Run:
    """Return the figures of one stack. The CPU time per job includes the jobs of the warm-up."""
    members = processes_of(running)
    with jobs.candidate("tidegate", running) as found:
        done, used = found.done(), cpu.usage(members)
        figures = jobs.measure(found, connections, seconds)
        spent, ended = cpu.usage(members).since(used), found.done() - done
    return Run(figures, {part: us / max(1, ended) for part, us in spent.items()})


def conclude(pairs: list[Pair], machine: dict[str, Any], chosen: Any) -> int:
    """Print and write the results. Return 1 if a bar is missed or a request failed."""
    sides = {"this checkout": [p.ours for p in pairs], chosen.revision: [p.theirs for p in pairs]}
    print(f"\n{report.machine_line(machine)}; {chosen.connections} connections, {chosen.seconds} s a round\n")
    fields = ("accepted", "done", "p50_ms", "p99_ms")
    rows = [
        [
            title,
            *(f"{median(getattr(run.jobs, name) for run in runs):,.1f}" for name in fields),
            str(sum(run.jobs.errors for run in runs)),
        ]
        for title, runs in sides.items()
    ]
    print(report.table(["", "accepted/s", "done/s", "p50 ms of the 202", "p99 ms", "errors"], rows))
    for part in sorted({part for runs in sides.values() for run in runs for part in run.cpu_us}):
        mine, other = (median(run.cpu_us.get(part, 0.0) for run in runs) for runs in sides.values())
        print(f"{part:>16}: {mine:6.1f} beside {other:6.1f} us of CPU per job")
    wrong = sum(run.jobs.errors for runs in sides.values() for run in runs)
    ratios = {rate: median(pair.ratio(rate) for pair in pairs) for rate in RATES}
    met = not wrong and min(ratios.values()) >= BAR
    shown = ", ".join(f"{rate} {ratio:.3f}x" for rate, ratio in ratios.items())
    print(f"{'PASS' if met else 'MISS'}  {shown}, at least {BAR}x; errors: {wrong}")
    report.write_json(
        chosen.out / "jobs-against.json",
        {"machine": machine, "revision": chosen.revision, "rounds": [asdict(pair) for pair in pairs]},
    )
    return 0 if met else 1


if __name__ == "__main__":
    session.run(main)
