"""Find a drift on a real stack, and measure what sampling costs: ``python -m benchmarks.drift``.

Rows of 64 normal features arrive at a fixed rate. First nothing changes, and false alarms are counted. Then
one feature shifts by 0.25 standard deviations, which must be found within two windows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import options, report, session, stack
from tidegate import AsyncClient
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError

MODEL = stack.MODELS / "drift" / "model.py"
NAME, FEATURES, SHIFT = "drift", 64, 0.25
ROWS_OF_A_REQUEST = 16
POLL_S = 1.0


@dataclass(slots=True)
class Source:
    """The rows that callers send. ``shift`` is that of the first feature, in standard deviations."""

    random: np.random.Generator
    shift: float = 0.0
    sent: int = 0

    def rows(self) -> np.ndarray[Any, Any]:
        """Return the rows of the next request."""
        found = self.random.standard_normal((ROWS_OF_A_REQUEST, FEATURES)).astype(np.float32)
        found[:, 0] += self.shift
        self.sent += ROWS_OF_A_REQUEST
        return found


@dataclass(frozen=True, slots=True)
class LiveResult:
    """The steady windows, false alarms among their verdicts, and the windows until the shift was found."""

    steady_windows: int
    feature_windows: int
    false_alarms: int
    windows_until_found: int | None
    drifted: list[str]
    sent_rows: int


async def send(url: str, source: Source, rate: float, stop: asyncio.Event) -> None:
    """Send requests until ``stop``, so that about ``rate`` rows per second arrive."""
    async with AsyncClient(url, timeout_s=30) as client:
        began = time.monotonic()
        while not stop.is_set():
            with suppress(TidegateError):
                await client.infer(NAME, {"x": source.rows()})
            await asyncio.sleep(max(0.0, began + source.sent / rate - time.monotonic()))


async def windows(running: stack.Stack, until: int, limit_s: float) -> dict[str, Any]:
    """Return the version's drift when it has ``until`` judged windows, or after ``limit_s`` seconds."""
    end = time.monotonic() + limit_s
    while True:
        found: dict[str, Any] = json.loads(await asyncio.to_thread(running.command, "drift", NAME, "--json"))[
            "items"
        ][0]
        if len(found["points"]) >= until or time.monotonic() > end:
            return found
        await asyncio.sleep(POLL_S)


async def live(running: stack.Stack, steady: int, rate: float, limit_s: float) -> LiveResult:
    """Let ``steady`` windows pass, shift a feature, and wait for three more windows."""
    running.deploy(MODEL, NAME, "--sampling", str(int(rate)))
    source, stop = Source(np.random.default_rng(1)), asyncio.Event()
    flow = asyncio.create_task(send(running.url, source, rate, stop))
    try:
        before = await windows(running, steady, limit_s)
        source.shift = SHIFT
        # The open window has rows from before the shift, so its verdict is not counted.
        after = await windows(running, len(before["points"]) + 3, limit_s)
    finally:
        stop.set()
        await tasks.end(flow)
    false = sum(len(point["drifted"]) for point in before["points"])
    shifted = after["points"][len(before["points"]) + 1 :]
    at = [at for at, point in enumerate(shifted, 1) if "x[0]" in point["drifted"]]
    count = len(before["points"])
    return LiveResult(
        count, count * FEATURES, false, at[0] if at else None, after["points"][-1]["drifted"], source.sent
    )


def main() -> int:
    """Run, print, and write drift.json. Return 1 if the shift was missed or there were false alarms."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("drift") as running:
        found = asyncio.run(live(running, chosen.steady, chosen.rate, chosen.limit))
    right = found.windows_until_found in (1, 2) and found.false_alarms * 1000 <= found.feature_windows
    print(f"{'PASS' if right else 'MISS'}  {found}")
    print(report.machine_line(machine))
    report.write_json(chosen.out / "drift.json", {"machine": machine, "live": asdict(found)})
    return 0 if right else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--rate", type=float, default=2000.0, help="rows per second (default: 2000)")
    parser.add_argument("--steady", type=int, default=16, help="windows without a change (default: 16)")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="longest wait for windows in seconds (default: 600)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
