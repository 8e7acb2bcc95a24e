"""``python -m benchmarks.run``: measure Tidegate, plain Triton and the peers with the same models and load.

One server runs at a time, newly started. Each round visits every server, so that a slow minute of the machine
does not affect only one of them. The table has the medians of the rounds. Callers of the same server (with
and without an API key) alternate.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bars, load, options, report, server, session, workloads
from benchmarks.install import WRK_MISSING
from benchmarks.model import ensure_digits
from benchmarks.peer import Peer, all_peers
from benchmarks.report import Results

INTERRUPTED = 130


def main() -> int:
    """Measure, print tables and bars, write results.json and results.png. Return 1 if a bar is missed."""
    known = all_peers()
    chosen = _arguments([peer.name for peer in known])
    peers = [peer for peer in known if peer.name in chosen.peers]
    if shutil.which("wrk") is None:
        print(WRK_MISSING)
        return 2
    results, began, whole = Results(), report.machine(), True
    with session.session():
        ensure_digits()
        try:
            measure(peers, chosen, results)
        except KeyboardInterrupt:
            whole = False
            print("\ninterrupted; results until now")
    missed = conclude(peers, chosen, results, began, whole=whole)
    return (1 if missed else 0) if whole else INTERRUPTED


def measure(peers: Sequence[Peer], chosen: argparse.Namespace, results: Results) -> None:
    """Run every round of every peer, into ``results``."""
    for number in range(chosen.repeats):
        # The order changes in each round, so that a server that heats the machine precedes different ones.
        for together in _by_server((*peers[number:], *peers[:number])):
            if any(peer.name in results.absent for peer in together):
                continue
            titles = " and ".join(peer.title for peer in together)
            print(f"round {number + 1} of {chosen.repeats}: {titles}", flush=True)
            try:
                visit(together[:: -1 if number % 2 else 1], chosen, results)
            except (server.NotServing, load.LoadFailed) as problem:
                results.absent |= {peer.name: f"round {number + 1}: {problem}" for peer in together}
                print(f"  not measured: {problem}", flush=True)


def _by_server(peers: Sequence[Peer]) -> list[list[Peer]]:
    servers: dict[str, list[Peer]] = {}
    for peer in peers:
        servers.setdefault(peer.server, []).append(peer)
    return list(servers.values())


def visit(together: Sequence[Peer], chosen: argparse.Namespace, results: Results) -> None:
    """Run one round of the peers of one server: start, check its answers, warm up, measure, stop."""
    began = time.monotonic()
    with server.serving(together, chosen.workloads) as served:
        print(f"  serves after {time.monotonic() - began:.1f} s, answers are right", flush=True)
        for name in chosen.workloads:
            for connections in chosen.concurrency:
                for peer in together:
                    exchange = served.exchange(peer, name)
                    load.warm(served.url, exchange, connections)
                    figures = load.measure(served.url, exchange, connections, chosen.seconds)
                    results.add(peer.name, name, figures)
                    _tell(peer, name, figures)


def _tell(peer: Peer, name: workloads.Name, figures: load.Figures) -> None:
    print(
        f"  {name:9} {figures.connections:3} connections {figures.rate:9,.0f} req/s"
        f"  p50 {figures.p50_ms:8.2f} ms  p99 {figures.p99_ms:8.2f} ms  {figures.errors} errors"
        f"{', with an API key' if peer.keyed else ''}",
        flush=True,
    )


def conclude(
    peers: Sequence[Peer],
    chosen: argparse.Namespace,
    results: Results,
    machine: dict[str, Any],
    *,
    whole: bool,
) -> bool:
    """Print and write the results. Return True if a bar was missed.

    Partial results never replace complete ones.
    """
    tables = [
        report.peers_table(results, peers, name, connections)
        for name in chosen.workloads
        for connections in chosen.concurrency
    ]
    judged = bars.judge(results, peers)
    print(f"\n{report.machine_line(machine)}; {chosen.seconds} s a run, {chosen.repeats} rounds\n")
    print("\n\n".join(tables), report.setups(peers, results.absent), sep="\n\n", end="\n\n")
    print("\n".join(bar.line() for bar in judged))
    out: Path = chosen.out / ("results.json" if whole else "interrupted.json")
    report.write_json(out, _document(peers, chosen, results, machine, judged))
    print(f"\nResults: {out}\n{report.draw('peers', out)}")
    return any(bar.verdict == "MISS" for bar in judged)


def _document(
    peers: Sequence[Peer],
    chosen: argparse.Namespace,
    results: Results,
    machine: dict[str, Any],
    judged: Sequence[bars.Bar],
) -> dict[str, Any]:
    runs = [
        {"peer": peer, "workload": workload} | figures.to_json()
        for (peer, workload, _), all_figures in results.runs.items()
        for figures in all_figures
    ]
    medians = [
        {"peer": peer, "workload": workload, "connections": connections}
        | {"rate": cell.rate, "p50_ms": cell.p50_ms, "p99_ms": cell.p99_ms, "rounds": cell.rounds}
        for peer, workload, connections in results.runs
        if (cell := results.cell(peer, workload, connections)) is not None
    ]
    return {
        "machine": machine,
        "seconds": chosen.seconds,
        "repeats": chosen.repeats,
        "titles": {peer.name: peer.title for peer in peers},
        "setups": {peer.name: peer.setup for peer in peers},
        "workloads": {name: workloads.TITLES[name] for name in chosen.workloads},
        "absent": results.absent,
        "medians": medians,
        "runs": runs,
        "bars": [{"text": bar.text, "verdict": bar.verdict, "detail": bar.detail} for bar in judged],
    }


def _arguments(known: list[str]) -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=5, repeats=3)
    listed = ", ".join(known)
    parser.add_argument(
        "--peers", type=options.names(known), default=known, help=f"comma-separated: {listed}"
    )
    parser.add_argument(
        "--workloads",
        type=options.names(workloads.NAMES),
        default=list(workloads.NAMES),
        help=f"comma-separated: {', '.join(workloads.NAMES)}",
    )
    parser.add_argument(
        "--concurrency", type=options.numbers, default=[1, 16, 64], help="connections (default: 1,16,64)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
