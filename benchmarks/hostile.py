"""``python -m benchmarks.hostile``: measure a valid caller beside thousands of hostile connections.

The caller has a key and sends requests at a steady rate: first alone, then beside 8,000 connections that are
silent, that stop in a head or a body, or that send single bytes slowly. Next are 8,250 connections that each
hold back the last byte of a small body, then single connections that send an endless head. Every request must
be answered, and p99 may be at most three times that of the caller alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil

from benchmarks import hostile_clients, options, report, session, stack
from benchmarks.client import HOST, Client
from benchmarks.stack import Stack

PER_S = 100.0
OPENING_S = 10.0
MANY, BODIES = 8_000, 8_250
P99_BAR = 3.0
# A gateway may grow by its budget for bodies, plus 40 KB for each connection.
GROWTH_BAR_MB = 512 + MANY * 0.04
MB = 1e6
_INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [[0.5] * 16]}
SMALL = json.dumps({"inputs": [_INPUT]}).encode()
# White space makes the body larger but costs no work. Every fourth request is larger than one read.
LARGE = SMALL + b" " * 300_000
OPENING = ", opening"
LINES, LONG = "50 MB of header lines", "200 MB header value"


@dataclass(slots=True)
class Step:
    """The valid caller's figures and the gateway's memory in one situation."""

    name: str
    times_ms: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    rss_before_mb: float = 0.0
    rss_peak_mb: float = 0.0
    hostile_open: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the step."""
        asked = len(self.times_ms) + self.failures.total()
        return {
            "name": self.name,
            "asked": asked,
            "success": len(self.times_ms) / asked if asked else 0.0,
            "p50_ms": _quantile(self.times_ms, 50),
            "p99_ms": _quantile(self.times_ms, 99),
            "max_ms": max(self.times_ms, default=0.0),
            "failures": dict(self.failures),
            "rss_before_mb": round(self.rss_before_mb, 1),
            "rss_peak_mb": round(self.rss_peak_mb, 1),
            "hostile_open": self.hostile_open,
        }


class Target:
    """A gateway under attack, and the valid caller's connections to it."""

    def __init__(self, port: int, pid: int, key: str) -> None:
        self.port = port
        self._process = psutil.Process(pid)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._client = Client(port)

    def rss_mb(self) -> float:
        """Return the gateway's resident memory."""
        return float(self._process.memory_info().rss) / MB

    def close(self) -> None:
        """Close the caller's connections."""
        self._client.close()

    async def ask(self, step: Step, seconds: float) -> None:
        """Send requests at a steady rate without waiting for earlier ones. Then wait for all responses."""
        tasks, began, number = set(), time.monotonic(), 0
        watching = asyncio.create_task(self._watch(step))
        while number < PER_S * seconds:
            due = began + number / PER_S
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._one(step, SMALL if number % 4 else LARGE, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.gather(*tasks)
        watching.cancel()

    async def _one(self, step: Step, body: bytes, due: float) -> None:
        """Send one request. Its latency is measured from the time at which it was due."""
        try:
            async with asyncio.timeout(60):
                answer = await self._client.post(hostile_clients.PATH.decode(), body, self._headers)
        except (OSError, EOFError, TimeoutError) as problem:
            step.failures[type(problem).__name__] += 1
            return
        if answer.status == 200:
            step.times_ms.append((time.monotonic() - due) * 1e3)
        else:
            step.failures[str(answer.status)] += 1

    async def _watch(self, step: Step) -> None:
        while True:
            step.rss_peak_mb = max(step.rss_peak_mb, self.rss_mb())
            await asyncio.sleep(0.02)


def main() -> int:
    """Measure, print, write hostile.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("hostile") as running:
        running.deploy(stack.MODELS / "echo" / "model.py", "echo")
        key = json.loads(running.command("keys", "create", "valid", "--json"))["key"]
        target = Target(running.gateway_port, gateway_pid(running), key)
        steps = asyncio.run(measure(target, float(chosen.seconds)))
    rows = [step.to_json() for step in steps]
    verdicts = judge(rows)
    print(f"\n{report.machine_line(machine)}; {PER_S:g} requests/s with a key, every fourth of 300 KB")
    print(f"\n{_table(rows)}\n\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "hostile.json"
    report.write_json(out, {"machine": machine, "steps": rows, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


def gateway_pid(running: Stack) -> int:
    """Return the process that listens on the gateway's port."""
    found = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == running.gateway_port]
    return next(pid for pid in found if pid)


async def measure(target: Target, seconds: float) -> list[Step]:
    """Run every situation. The quiet one is first and last."""
    steps = []
    await _known(target)

    async def step(name: str) -> Step:
        steps.append(Step(name, rss_before_mb=target.rss_mb()))
        return steps[-1]

    await target.ask(await step("quiet"), seconds)
    for name, kind, count in (
        (f"{MANY} mixed", hostile_clients.MIXED, MANY),
        (f"{BODIES} all but a byte", "all but a byte", BODIES),
    ):
        opening = await step(f"{name}{OPENING}")
        async with _attacked(target.port, kind, count, opening):
            await target.ask(opening, OPENING_S)
            found = await step(name)
            found.rss_before_mb = opening.rss_before_mb
            await target.ask(found, 2 * seconds)
            found.hostile_open = opening.hostile_open
        await asyncio.sleep(1.0)
    for name, line, size in (
        (LINES, b"a:\r\n" * 65_536, 50_000_000),
        (LONG, b"v" * 262_144, 200_000_000),
    ):
        found = await step(name)
        sending = asyncio.create_task(_endless_head(target.port, line, size))
        await target.ask(found, seconds / 2)
        sending.cancel()
    await target.ask(await step("quiet again"), seconds)
    target.close()
    return steps


async def _known(target: Target) -> None:
    """Wait until the gateway has the key and the model answers."""
    while True:
        step = Step("first")
        await target.ask(step, 0.5)
        if not step.failures:
            return


@asynccontextmanager
async def _attacked(port: int, kind: str, count: int, step: Step) -> AsyncIterator[None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.hostile_clients", str(port), kind, str(count)),
        stdout=asyncio.subprocess.PIPE,
    )

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            step.hostile_open = max(step.hostile_open, int(line))

    reading = asyncio.create_task(read())
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await reading


async def _endless_head(port: int, piece: bytes, size: int) -> None:
    """Send a head that does not end, until all of it is sent or the server closes the connection."""
    with suppress(OSError):
        _, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\nx: ")
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()


def judge(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the bars: all answered, p99 relative to the quiet steps, memory.

    While thousands of connections are opened and their bodies read, p99 has no bar.
    """
    quiet = (rows[0]["p99_ms"] + rows[-1]["p99_ms"]) / 2
    verdicts = []
    for row in rows[1:-1]:
        ratio = row["p99_ms"] / quiet if quiet else 0.0
        grown = row["rss_peak_mb"] - row["rss_before_mb"]
        quick = ratio <= P99_BAR or row["name"].endswith(OPENING)
        fine = row["success"] == 1.0 and quick and grown <= GROWTH_BAR_MB
        verdicts.append(
            (
                "PASS" if fine else "MISS",
                f"{row['name']}: {row['success']:.2%} answered, p99 {ratio:.1f} times that of the quiet "
                f"gateway (at most {P99_BAR:g}), memory +{grown:.0f} MB (at most {GROWTH_BAR_MB:.0f})",
            )
        )
    return verdicts


def _quantile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else 0.0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["name"],
            str(row["hostile_open"]),
            str(row["asked"]),
            f"{row['success']:.2%}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['max_ms']:.0f}",
            f"{row['rss_before_mb']:.0f}",
            f"{row['rss_peak_mb']:.0f}",
        ]
        for row in rows
    ]
    head = ["beside", "open", "asked", "answered", "p50 ms", "p99 ms", "max ms", "MB before", "MB peak"]
    return report.table(head, lines)


def _arguments() -> argparse.Namespace:
    return options.parser(__doc__, seconds=10).parse_args()


if __name__ == "__main__":
    session.run(main)
