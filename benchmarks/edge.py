"""Measure a stack in the edge profile on one core: ``python -m benchmarks.edge``.

The stack gets one core and, where control groups allow it, 1 GiB. It serves the digits model. The load
generator has the other cores. The default profile on the same core is measured too, for comparison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import cpu, load, options, report, session, stack, workloads
from benchmarks.load import Figures, Load
from benchmarks.model import ensure_digits
from benchmarks.stack import Stack
from tidegate.stack import memory, processes
from tidegate.stack.memory import PartMemory
from tidegate.stack.record import RunFolder

PROFILES = ("edge", "default")
GROUPS = Path("/sys/fs/cgroup")
MEMORY = 2**30
# Long enough for the first garbage collections and the first rounds of every loop.
REST_S = 10.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Result:
    """A profile's memory at rest and under load, its use of the core at rest, and the runs of the load."""

    profile: str
    limited: bool
    rest: list[PartMemory]
    loaded: list[PartMemory]
    cpu_at_rest: dict[str, float]
    runs: list[Figures]

    def to_json(self) -> dict[str, Any]:
        """Return the result as a plain object."""
        return {
            "profile": self.profile,
            "memory_limit": MEMORY if self.limited else None,
            "rest": [asdict(part) for part in self.rest],
            "loaded": [asdict(part) for part in self.loaded],
            "cpu_at_rest": self.cpu_at_rest,
            "runs": [run.to_json() for run in self.runs],
        }


@contextmanager
def confined(core: int) -> Iterator[bool]:
    """Start processes on one core during the block, and with 1 GiB if control groups allow it.

    Yield True if the memory is limited. Afterwards this process has its other cores again, and the
    processes that were started keep their limits.
    """
    cores = os.sched_getaffinity(0)
    group, before = GROUPS / f"tidegate-edge-{os.getpid()}", own_group()
    limited = before is not None and _enter(group)
    os.sched_setaffinity(0, {core})
    try:
        yield limited
    finally:
        os.sched_setaffinity(0, cores - {core} or cores)
        if limited and before is not None:
            (before / "cgroup.procs").write_text(str(os.getpid()))


def own_group() -> Path | None:
    """Return this process's control group; None if the machine has no groups of version 2."""
    found = Path("/proc/self/cgroup").read_text().strip()
    there = found.startswith("0::") and "\n" not in found and (GROUPS / "cgroup.controllers").exists()
    return GROUPS / found.removeprefix("0::").lstrip("/") if there else None


def _enter(group: Path) -> bool:
    """Make a control group with 1 GiB, and enter it. Return False if that is not allowed here."""
    try:
        group.mkdir()
        (group / "memory.max").write_text(str(MEMORY))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        _leave(group)
        return False
    return True


def _leave(group: Path) -> None:
    try:
        group.rmdir()
    except OSError:
        return


def measure(profile: str, core: int, connections: Sequence[int], seconds: int) -> Result:
    """Measure one profile on a stack of its own."""
    cores = os.sched_getaffinity(0)
    loaded: list[PartMemory] = []
    runs: list[Figures] = []
    try:
        with ExitStack() as ends:
            with confined(core) as limited:
                running = ends.enter_context(stack.tidegate(f"edge-{profile}", {"TIDEGATE_PROFILE": profile}))
            running.deploy(workloads.onnx_model(), "digits")
            exchange = workloads.exchange("digits", "oip")
            load.warm(running.url, exchange, 1)
            time.sleep(REST_S)
            rest, busy = look(running), idle_cpu(running)
            for count in connections:
                run = Load(running.url, exchange, count, seconds)
                time.sleep(seconds * 0.8)
                loaded = max(loaded, look(running), key=memory.total)
                runs.append(run.result())
    finally:
        os.sched_setaffinity(0, cores)
        _leave(GROUPS / f"tidegate-edge-{os.getpid()}")
    return Result(profile, limited, rest, loaded, busy, runs)


def idle_cpu(running: Stack) -> dict[str, float]:
    """Return the share of a core that each kind of process uses at rest."""
    members = processes.marked(running.state)
    before, began = cpu.usage(members), time.monotonic()
    time.sleep(REST_S)
    spent_us = cpu.usage(members).since(before)
    return {kind: us / 1e6 / (time.monotonic() - began) for kind, us in spent_us.items()}


def look(running: Stack) -> list[PartMemory]:
    """Return the memory of the stack's parts now."""
    return memory.of_stack(RunFolder(running.state / "run").read(), running.state)


def show(result: Result) -> None:
    """Print the tables of a profile."""
    limit = "1 GiB" if result.limited else "no limit of memory (no control group can be made here)"
    print(f"\nProfile {result.profile}, one core, {limit}:\n")
    loaded = {part.name: part for part in result.loaded}
    rows = [
        [part.name, str(part.processes), *(f"{size / MIB:.0f}" for size in _sizes(part, loaded))]
        for part in result.rest
    ]
    sums = [f"{memory.total(parts) / MIB:.0f}" for parts in (result.rest, result.loaded)]
    rows.append(["all", str(sum(part.processes for part in result.rest)), sums[0], "", sums[1]])
    print(report.table(["part", "processes", "PSS at rest, MiB", "RSS at rest", "PSS under load"], rows))
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(result.cpu_at_rest.items()))
    print(f"\nThe core at rest: {sum(result.cpu_at_rest.values()):.1%} used ({shares}).\n")
    runs = [
        [str(run.connections), f"{run.rate:,.0f}", f"{run.p50_ms:.2f}", f"{run.p99_ms:.2f}", str(run.errors)]
        for run in result.runs
    ]
    print(report.table(["callers", "requests/s", "p50 ms", "p99 ms", "errors"], runs))


def _sizes(part: PartMemory, loaded: dict[str, PartMemory]) -> tuple[int, int, int]:
    return part.pss, part.rss, loaded[part.name].pss if part.name in loaded else 0


def main() -> int:
    """Measure the profiles. Return 1 if a request failed."""
    parser = options.parser(__doc__, seconds=10)
    parser.add_argument("--connections", type=options.numbers, default=[1, 8, 32], metavar="N,...")
    parser.add_argument(
        "--profiles", type=options.names(PROFILES), default=list(PROFILES), metavar="NAME,..."
    )
    chosen = parser.parse_args()
    machine = report.machine()
    print(report.machine_line(machine))
    with session.session():
        ensure_digits()
        core = min(os.sched_getaffinity(0))
        results = [measure(name, core, chosen.connections, chosen.seconds) for name in chosen.profiles]
    for result in results:
        show(result)
    document = {"machine": machine, "profiles": [result.to_json() for result in results]}
    report.write_json(chosen.out / "edge.json", document)
    return 0 if all(run.valid for result in results for run in result.runs) else 1


if __name__ == "__main__":
    session.run(main)
