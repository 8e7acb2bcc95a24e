"""``python -m benchmarks.soak``: measure and draw the memory of every process over 20 minutes of mixed load.

First the machine's capacity is measured: requests, then jobs of the identity model, as fast as possible. Then
both run together at a share of that capacity. The proportional set size of every process is read every few
seconds. A process passes if its memory in the last quarter is no more than in the second one, within a
tolerance.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cpu, load, options, report, session, stack, workloads
from benchmarks.load import Figures, Load
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange
from tidegate.kernel import credentials
from tidegate.kernel.store import JobStore
from tidegate.stack import processes
from tidegate.stack.processes import PROC, Process

CONNECTIONS = 32
# The share of requests in the load. The rest are jobs.
REQUESTS_PART = 0.7
EVERY_S = 5.0
MEASURE_S = 8
# Allowed growth, such as a page of malloc or a newly loaded block of code.
TOLERANCE, TOLERANCE_MB = 0.05, 8.0
# Growth from one quarter to the next that is never allowed twice in a row. It can be a slow leak.
STEADY_MB = 2.0
MB = 1e6


@dataclass(frozen=True, slots=True)
class Look:
    """The memory of the stack at one moment: seconds from the beginning, megabytes by kind of process."""

    at: float
    mb: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The medians of a kind of process in the second, the third and the last quarter, in megabytes."""

    kind: str
    before: float
    between: float
    after: float

    @property
    def flat(self) -> bool:
        """True if the memory did not grow."""
        steps = (self.between - self.before, self.after - self.between)
        return self.after <= self.before * (1 + TOLERANCE) + TOLERANCE_MB and min(steps) <= STEADY_MB


def main() -> int:
    """Measure, print the table, write soak.json and soak.png. Return 1 if one grew or a request failed."""
    parser = options.parser(__doc__, seconds=1200)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity (default: 0.7)")
    parser.add_argument(
        "--kept-mb", type=int, default=64, help="TIDEGATE_JOBS_KEPT_BYTES, in MB (default: 64)"
    )
    chosen = parser.parse_args()
    machine = report.machine()
    # A small limit and a short minimum age, so that the jobs' store is full after a few minutes.
    settings = {
        "TIDEGATE_JOBS_KEPT_BYTES": str(chosen.kept_mb * 10**6),
        "TIDEGATE_JOBS_KEPT_MIN_S": "60",
    }
    with session.session(), stack.tidegate("soak", settings) as running:
        running.deploy(stack.EXAMPLES / "identity" / "model.py", "identity")
        request = workloads.exchange("identity", "oip")
        job = replace(request, headers=request.headers | {"Prefer": "respond-async"})
        pauses = {
            name: _pause_ms(running, name, each, chosen.share)
            for name, each in (("requests", request), ("jobs", job))
        }
        figures, looks = soak(running, {"requests": request, "jobs": job}, pauses, chosen.seconds)
        used, kept, _ = asyncio.run(_store_size(running))
        print(f"\n{kept:,} jobs kept in {used / MB:.0f} MB: a million would cost {used / kept / 1e3:.2f} GB")
    return conclude(figures, looks, machine, chosen)


def _pause_ms(running: Stack, name: str, exchange: Exchange, share: float) -> float:
    """Measure the capacity of one kind of call. Return the pause between calls for its part of the load."""
    load.warm(running.url, exchange, CONNECTIONS)
    alone = load.measure(running.url, exchange, CONNECTIONS, MEASURE_S)
    part = share * (REQUESTS_PART if name == "requests" else 1 - REQUESTS_PART)
    rate = alone.rate * part
    print(f"{name}: {alone.rate:,.0f}/s alone; the soak asks for {rate:,.0f}/s of them", flush=True)
    return max(0.0, CONNECTIONS / rate * 1e3 - alone.p50_ms / 4)


async def _store_size(running: Stack) -> tuple[int, int, int]:
    store = JobStore.connect(running.server_url(credentials.VALKEY_JOBS, "router"))
    try:
        return await store.size()
    finally:
        await store.close()


def soak(
    running: Stack, exchanges: Mapping[str, Exchange], pauses: Mapping[str, float], seconds: int
) -> tuple[dict[str, Figures], list[Look]]:
    """Load the stack and read its memory until the load ends."""
    loads: dict[str, Load] = {}
    looks: list[Look] = []
    try:
        for name, exchange in exchanges.items():
            loads[name] = Load(running.url, exchange, CONNECTIONS, seconds, pause_ms=pauses[name])
        begun = time.monotonic()
        while (at := time.monotonic() - begun) < seconds:
            looks.append(Look(at, memory(processes.marked(running.state))))
            if len(looks) % 12 == 1:
                print(_line(looks[-1]), flush=True)
            time.sleep(EVERY_S)
        return {name: each.result() for name, each in loads.items()}, looks
    finally:
        for each in loads.values():
            each.stop()


def memory(members: Iterable[Process]) -> dict[str, float]:
    """Return the proportional set size of these processes in megabytes, by kind."""
    found: dict[str, float] = {}
    for process in members:
        kind = kind_of(process.command(limit=None))
        found[kind] = found.get(kind, 0.0) + _pss_mb(process.pid)
    return found


def kind_of(command: str) -> str:
    """Return the part of the stack that a command line belongs to: a service's name, or another part."""
    if "/jobs/valkey.conf" in command:
        return "Valkey, jobs"
    service = command.partition("services.")[2].split(" ")[0]
    return service or cpu.kind_of(command)


def _pss_mb(pid: int) -> float:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / MB


def judge(looks: Sequence[Look]) -> list[Verdict]:
    """Compare the last three quarters of the run, for every kind of process."""
    quarter = max(1, len(looks) // 4)
    second, third, last = looks[quarter : 2 * quarter], looks[-2 * quarter : -quarter], looks[-quarter:]
    kinds = sorted({kind for look in looks for kind in look.mb})
    return [
        Verdict(
            kind,
            *(median(look.mb.get(kind, 0.0) for look in part) for part in (second, third, last)),
        )
        for kind in kinds
    ]


def _line(look: Look) -> str:
    parts = ", ".join(f"{kind} {mb:.0f}" for kind, mb in sorted(look.mb.items()))
    return f"{look.at:6.0f} s, MB: {parts}"


def conclude(
    figures: Mapping[str, Figures], looks: Sequence[Look], machine: dict[str, Any], chosen: Any
) -> int:
    """Print and write the result. Return 1 if a process grew or a request failed."""
    verdicts = judge(looks)
    print(f"\n{report.machine_line(machine)}; {chosen.seconds} s at {chosen.share:.0%} of the capacity\n")
    for name, found in figures.items():
        print(
            f"{name}: {found.requests:,} ({found.rate:,.0f}/s), p99 {found.p99_ms:.1f} ms, "
            f"{found.errors} errors"
        )
    rows = [[v.kind, f"{v.before:.0f}", f"{v.after:.0f}", "flat" if v.flat else "GREW"] for v in verdicts]
    print("\n" + report.table(["", "MB, second quarter", "MB, last quarter", ""], rows))
    out: Path = chosen.out
    document = {
        "machine": machine,
        "seconds": chosen.seconds,
        "share": chosen.share,
        "figures": {name: found.to_json() for name, found in figures.items()},
        "looks": [asdict(look) for look in looks],
    }
    report.write_json(out / "soak.json", document)
    print("\n" + report.draw("soak", out / "soak.json"))
    failed = any(found.errors for found in figures.values()) or not all(v.flat for v in verdicts)
    print(f"\n{'MISS: a process grew, or a request failed' if failed else 'PASS: none grew, none failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    session.run(main)
