"""Tables of results: medians of the rounds, and ratios to Tidegate."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import places
from benchmarks.load import Figures
from benchmarks.peer import Peer
from benchmarks.workloads import TITLES, Name


@dataclass(frozen=True, slots=True)
class Cell:
    """The medians of the valid rounds of one peer, workload and number of connections."""

    rate: float
    p50_ms: float
    p99_ms: float
    rounds: int
    errors: int


@dataclass(slots=True)
class Results:
    """All runs of all rounds, and the reason if a peer has none."""

    runs: dict[tuple[str, Name, int], list[Figures]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, peer: str, workload: Name, figures: Figures) -> None:
        """Store one run."""
        self.runs.setdefault((peer, workload, figures.connections), []).append(figures)

    def cell(self, peer: str, workload: Name, connections: int) -> Cell | None:
        """Return the medians, or None if no run is valid. A run with an error is not valid."""
        runs = self.runs.get((peer, workload, connections), [])
        valid = [run for run in runs if run.valid]
        if not valid:
            return None
        return Cell(
            rate=median(run.rate for run in valid),
            p50_ms=median(run.p50_ms for run in valid),
            p99_ms=median(run.p99_ms for run in valid),
            rounds=len(valid),
            errors=sum(run.errors for run in runs),
        )

    def ratio(self, peer: str, to: str, workload: Name, connections: int) -> float | None:
        """Return the median ratio of the rates of two peers on the same server.

        Only rounds in which both had valid runs are used.
        """
        ours, others = (self.runs.get((name, workload, connections), []) for name in (peer, to))
        found = [a.rate / b.rate for a, b in zip(ours, others, strict=False) if a.valid and b.valid]
        return median(found) if found else None

    def errors(self, peer: str, workload: Name, connections: int) -> int:
        """Return the number of failed requests in all rounds."""
        return sum(run.errors for run in self.runs.get((peer, workload, connections), []))

    def rate(self, peer: str, workload: Name, connections: int) -> float | None:
        """Median requests per second, or None."""
        found = self.cell(peer, workload, connections)
        return found.rate if found else None

    def p50_ms(self, peer: str, workload: Name, connections: int) -> float | None:
        """Median of the medians in milliseconds, or None."""
        found = self.cell(peer, workload, connections)
        return found.p50_ms if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table that is readable as text: first column left, numbers right."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]

    def drawn(line: Sequence[str]) -> str:
        cells = [
            text.ljust(widths[at]) if at == 0 else text.rjust(widths[at]) for at, text in enumerate(line)
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([drawn(lines[0]), drawn(rule), *map(drawn, lines[1:])])


def peers_table(results: Results, peers: Sequence[Peer], workload: Name, connections: int) -> str:
    """Return one workload at one number of connections: every peer, and Tidegate's speed relative to it."""
    ours = results.rate("tidegate", workload, connections)
    triton = results.rate("triton", workload, connections)
    rows = []
    for peer in peers:
        found = results.cell(peer.name, workload, connections)
        if found is None:
            bad = results.errors(peer.name, workload, connections)
            why = f"invalid: {bad} errors" if bad else "not measured"
            rows.append([peer.title, why, "", "", "", "", ""])
            continue
        errors = results.errors(peer.name, workload, connections)
        rows.append(
            [
                peer.title,
                f"{found.rate:,.0f}",
                f"{found.p50_ms:.2f}",
                f"{found.p99_ms:.2f}",
                str(errors),
                ratio(found.rate, triton),
                ratio(ours, found.rate),
            ]
        )
    plural = "connection" if connections == 1 else "connections"
    head = ["", "req/s", "p50 ms", "p99 ms", "errors", "of Triton", "Tidegate / it"]
    return f"{TITLES[workload]}, {connections} {plural}\n\n{table(head, rows)}"


def ratio(value: float | None, base: float | None) -> str:
    """Return ``value / base`` for a cell; empty if one is unknown."""
    return f"{value / base:.2f}x" if value is not None and base else ""


def setups(peers: Sequence[Peer], absent: dict[str, str]) -> str:
    """Return the configuration of each peer, and why a peer is missing."""
    lines = [f"- {peer.title}: {peer.setup}." for peer in peers]
    lines += [f"- {name}: NOT MEASURED: {reason}" for name, reason in absent.items()]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return the machine and the versions of the measurement."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def machine_line(found: dict[str, Any]) -> str:
    """Return the machine in one line."""
    return (
        f"{found['cpu']}, {found['cores']} cores shared with the load generator, Python {found['python']}; "
        f"load average at the start {found['load_1min']}"
    )


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def draw(kind: str, results: Path, suffix: str = ".png") -> str:
    """Draw a result file's chart beside it, in the charts' environment. Return a message of the outcome."""
    python, picture = places.python(places.PLOT), results.with_suffix(suffix)
    if not python.exists():
        return "No chart: python -m benchmarks.install --only plot"
    command = [str(python), str(places.HERE / "plot.py"), kind, str(results), str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        return f"No chart: {done.stderr.strip()[-300:]}"
    return f"Chart: {picture}"
