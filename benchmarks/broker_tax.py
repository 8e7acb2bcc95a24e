"""``python -m benchmarks.broker_tax``: measure what the queue costs: Tidegate minus plain Triton, on W2.

Both run at the same time and are loaded alternately. The results are the median latency, the CPU time per
request of each process (from /proc), and the parts of a request from the gateway's header Server-Timing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import cpu, load, options, places, report, server, session, stack, workloads
from benchmarks.client import Client
from benchmarks.load import Figures
from benchmarks.model import ensure_digits
from benchmarks.peer import all_peers
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange
from tidegate.stack import processes
from tidegate.stack.processes import Process

PARTS = ("decode", "transit", "wait", "compute", "encode", "total")
SAMPLE_EVERY_S = 0.02


@dataclass(slots=True)
class Side:
    """Tidegate or Triton: its address, its processes, and its results by number of connections."""

    title: str
    url: str
    members: Callable[[], Iterable[Process]]
    figures: dict[int, list[Figures]] = field(default_factory=dict)
    cpu_us: dict[int, list[dict[str, float]]] = field(default_factory=dict)

    def run(self, exchange: Exchange, connections: int, seconds: int) -> None:
        """Measure one run, with the CPU time per request."""
        load.warm(self.url, exchange, connections)
        before = cpu.usage(self.members())
        figures = load.measure(self.url, exchange, connections, seconds)
        used = cpu.usage(self.members()).since(before)
        self.figures.setdefault(connections, []).append(figures)
        per_request = {kind: us / max(1, figures.requests) for kind, us in used.items()}
        self.cpu_us.setdefault(connections, []).append(per_request)

    def median_cpu(self, connections: int) -> dict[str, float]:
        """Microseconds per request by kind of process, medians of the rounds."""
        rounds = self.cpu_us[connections]
        kinds = {kind for each in rounds for kind in each}
        return {kind: median(each.get(kind, 0.0) for each in rounds) for kind in sorted(kinds)}

    def median_of(self, connections: int, pick: Callable[[Figures], float]) -> float:
        """Return the median of a figure over the rounds."""
        return median(pick(figures) for figures in self.figures[connections])


def main() -> int:
    """Measure, print, write broker_tax.json. Return 1 if a run had errors."""
    chosen = _arguments()
    machine = report.machine()
    with session.session():
        ensure_digits()
        found = measure(chosen)
    print(f"\n{report.machine_line(machine)}; {chosen.seconds} s a run, {chosen.repeats} rounds\n")
    print("\n\n".join(_tables(found)))
    out: Path = chosen.out / "broker_tax.json"
    report.write_json(out, {"machine": machine} | found)
    print(f"\nResults: {out}")
    errors = sum(
        row[side]["errors"] for row in found["connections"].values() for side in ("triton", "tidegate")
    )
    if errors:
        print(f"{errors} requests failed: these figures do not count.")
    return 1 if errors else 0


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure both alternately, at each number of connections."""
    peer = next(peer for peer in all_peers() if peer.name == "triton")
    exchange = workloads.exchange("digits", "oip")
    with ExitStack() as held:
        direct_url = held.enter_context(server.serving([peer], ["digits"])).url
        running = held.enter_context(stack.tidegate("broker-tax"))
        running.deploy(workloads.onnx_model(), "digits")
        direct = Side("Triton", direct_url, lambda: _direct_processes(peer.name))
        ours = Side("Tidegate", running.url, lambda: processes.marked(running.state))
        timings: dict[int, dict[str, float]] = {}
        for number in range(chosen.repeats):
            for connections in chosen.concurrency:
                print(f"round {number + 1} of {chosen.repeats}: {connections} connections", flush=True)
                for side in (direct, ours):
                    side.run(exchange, connections, chosen.seconds)
        for connections in chosen.concurrency:
            print(f"the parts of a request at {connections} connections", flush=True)
            timings[connections] = hops(running, exchange, connections, chosen.seconds)
    return _document(direct, ours, timings)


def _direct_processes(name: str) -> list[Process]:
    """Return the processes of plain Triton: their command lines contain the peer's folder."""
    folder = str(places.work_dir(name) / "models")
    found = (processes.find(int(e.name)) for e in processes.PROC.iterdir() if e.name.isdigit())
    roots = [p for p in found if p and p.pid != os.getpid() and folder in p.command(limit=None)]
    return list({member for root in roots for member in cpu.family(root.pid)})


def hops(running: Stack, exchange: Exchange, connections: int, seconds: int) -> dict[str, float]:
    """Median parts of a request in ms, as a caller sees them while ``connections - 1`` others load it."""
    others = load.Load(running.url, exchange, connections - 1, seconds) if connections > 1 else None
    try:
        return asyncio.run(_sample(running.gateway_port, exchange, seconds))
    finally:
        if others is not None:
            others.stop()


async def _sample(port: int, exchange: Exchange, seconds: int) -> dict[str, float]:
    client, seen = Client(port), []
    try:
        # Shorter than the load, so that every sample is taken under load.
        async with asyncio.timeout(seconds - 0.3):
            while True:
                answer = await client.post(exchange.path, exchange.body, exchange.headers)
                seen.append(parse_timing(answer.headers.get("server-timing", "")))
                await asyncio.sleep(SAMPLE_EVERY_S)
    except TimeoutError:
        pass
    finally:
        client.close()
    return {part: median(each.get(part, 0.0) for each in seen) for part in PARTS} if seen else {}


def parse_timing(header: str) -> dict[str, float]:
    """Parse ``decode;dur=0.1, total;dur=2.3`` as milliseconds by part."""
    found = {}
    for entry in header.split(","):
        name, _, rest = entry.strip().partition(";dur=")
        if rest:
            found[name] = float(rest)
    return found


def _document(direct: Side, ours: Side, timings: dict[int, dict[str, float]]) -> dict[str, Any]:
    rows = {}
    for connections in direct.figures:
        sides: dict[str, Any] = {
            key: {
                "rate": side.median_of(connections, lambda f: f.rate),
                "p50_ms": side.median_of(connections, lambda f: f.p50_ms),
                "p99_ms": side.median_of(connections, lambda f: f.p99_ms),
                "errors": sum(figures.errors for figures in side.figures[connections]),
                "cpu_us": side.median_cpu(connections),
            }
            for key, side in (("triton", direct), ("tidegate", ours))
        }
        rows[str(connections)] = sides | {
            "tax_p50_ms": sides["tidegate"]["p50_ms"] - sides["triton"]["p50_ms"],
            "tax_cpu_us": sum(sides["tidegate"]["cpu_us"].values()) - sum(sides["triton"]["cpu_us"].values()),
            "hops_ms": timings[connections],
        }
    return {"connections": rows}


def _tables(found: dict[str, Any]) -> list[str]:
    rows = found["connections"]
    latency = [
        [
            count,
            *(f"{row[side]['p50_ms']:.2f}" for side in ("triton", "tidegate")),
            f"{row['tax_p50_ms']:+.2f}",
            *(f"{row[side]['rate']:,.0f}" for side in ("triton", "tidegate")),
            report.ratio(row["tidegate"]["rate"], row["triton"]["rate"]),
        ]
        for count, row in rows.items()
    ]
    head = [
        "connections",
        "Triton p50 ms",
        "Tidegate p50 ms",
        "tax ms",
        "Triton req/s",
        "Tidegate req/s",
        "ratio",
    ]
    return [
        f"Latency and throughput, W2\n\n{report.table(head, latency)}",
        _cpu_table(rows),
        "Parts of a request in ms, medians (Server-Timing)\n\n"
        + report.table(
            ["connections", *PARTS],
            [[count, *(f"{row['hops_ms'].get(p, 0.0):.3f}" for p in PARTS)] for count, row in rows.items()],
        ),
    ]


def _cpu_table(rows: dict[str, Any]) -> str:
    kinds = sorted({kind for row in rows.values() for kind in row["tidegate"]["cpu_us"]})
    lines = [
        [
            count,
            f"{sum(row['triton']['cpu_us'].values()):.0f}",
            *(f"{row['tidegate']['cpu_us'].get(kind, 0.0):.0f}" for kind in kinds),
            f"{row['tax_cpu_us']:+.0f}",
        ]
        for count, row in rows.items()
    ]
    head = ["connections", "Triton alone", *kinds, "tax"]
    return f"CPU microseconds per request\n\n{report.table(head, lines)}"


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=5, repeats=3)
    parser.add_argument(
        "--concurrency", type=options.numbers, default=[1, 16, 64], help="connections (default: 1,16,64)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
