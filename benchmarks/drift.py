"""Find a drift on a real stack, and measure what sampling costs: ``python -m benchmarks.drift``.

Rows of 64 normal features arrive at a fixed rate. First nothing changes, and false alarms are counted. Then
one feature shifts by 0.25 standard deviations, which must be found within two windows. For the cost, wrk
loads two Deployments of the digits model alternately: one samples the default number of rows, the other none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import timeit
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks import against, load, options, report, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.model import ensure_digits
from tidegate import AsyncClient
from tidegate.kernel import tasks
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.profiles.bins import learn_all
from tidegate.kernel.profiles.columns import Columns, SampledTensor, add_tensor
from tidegate.kernel.profiles.profile import Profile

MODEL = stack.MODELS / "drift" / "model.py"
NAME, FEATURES, SHIFT = "drift", 64, 0.25
PARTS = ("live", "cost")
BAR = 0.97
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


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians of the rounds: requests per second with and without sampling, and their ratio.

    ``worker_us``: CPU time of a request in the worker, in microseconds. ``row_us``: CPU time to count a row
    of 64 features.
    """

    on: float
    off: float
    ratio: float
    worker_us_on: float
    worker_us_off: float
    row_us: float


def cost(running: stack.Stack, repeats: int, seconds: int, connections: int) -> Cost:
    """Load both Deployments alternately, and print every round."""
    exchange = workloads.exchange("digits", "oip")
    exchanges = {}
    for name, sampling in (("sampling-on", ()), ("sampling-off", ("--sampling", "0"))):
        running.deploy(workloads.onnx_model(), name, *sampling)
        exchanges[name] = replace(exchange, path=f"/v2/models/{name}/infer")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in exchanges}
    for number in range(repeats):
        order = list(exchanges) if number % 2 == 0 else list(reversed(exchanges))
        for name in order:
            load.warm(running.url, exchanges[name], connections)
            figures, used = against.measure(running, exchanges[name], connections, seconds)
            if not figures.valid:
                raise BenchmarkFailed(f"{figures.errors} requests of {figures.requests} failed")
            found[name].append((figures.rate, used.get("worker", 0.0)))
        on, off = found["sampling-on"][-1][0], found["sampling-off"][-1][0]
        print(
            f"round {number + 1}: {on:,.0f} requests/s with, {off:,.0f} without, {on / off:.3f}x", flush=True
        )
    pairs = list(zip(found["sampling-on"], found["sampling-off"], strict=True))
    return Cost(
        median(on[0] for on, _ in pairs),
        median(off[0] for _, off in pairs),
        median(on[0] / off[0] for on, off in pairs),
        median(on[1] for on, _ in pairs),
        median(off[1] for _, off in pairs),
        counting_us(),
    )


def counting_us(rows: int = 256, features: int = FEATURES) -> float:
    """Return the time to count a row, in microseconds, if ``rows`` rows are counted together."""
    table = np.random.default_rng(1).standard_normal((rows, features)).astype(np.float32)
    tensor = SampledTensor("x", "FP32", (features,), table.tobytes())
    first = Columns(rows)
    add_tensor(first, tensor)
    bins, profile = learn_all(first), Profile()

    def count() -> None:
        columns = Columns(rows)
        add_tensor(columns, tensor)
        profile.count(columns, bins)

    return min(timeit.repeat(count, number=20, repeat=5)) / 20 / rows * 1e6


def main() -> int:
    """Run, print, and write drift.json. Return 1 if a bar was missed."""
    chosen = _arguments()
    machine = report.machine()
    document: dict[str, Any] = {"machine": machine}
    passed = True
    with session.session(), stack.tidegate("drift") as running:
        if "live" in chosen.only:
            found = asyncio.run(live(running, chosen.steady, chosen.rate, chosen.limit))
            right = found.windows_until_found in (1, 2) and found.false_alarms * 1000 <= found.feature_windows
            running.command("drift", NAME, "--plot", str(chosen.out / "drift.svg"))
            running.command("delete", NAME, "--yes")
            passed &= tell(right, found)
            document["live"] = asdict(found)
        if "cost" in chosen.only:
            ensure_digits()
            spent = cost(running, chosen.repeats, chosen.seconds, chosen.connections)
            passed &= tell(spent.ratio >= BAR, spent)
            document["cost"] = asdict(spent)
    print(report.machine_line(machine))
    report.write_json(chosen.out / "drift.json", document)
    return 0 if passed else 1


def tell(right: bool, found: LiveResult | Cost) -> bool:
    """Print a result. Return True if it is right."""
    print(f"{'PASS' if right else 'MISS'}  {found}", flush=True)
    return right


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=8, repeats=9)
    parser.add_argument(
        "--only", type=options.names(PARTS), default=list(PARTS), help="parts to run (default: live,cost)"
    )
    parser.add_argument("--connections", type=int, default=64, help="of wrk (default: 64)")
    parser.add_argument("--rate", type=float, default=2000.0, help="rows per second (default: 2000)")
    parser.add_argument("--steady", type=int, default=16, help="windows without a change (default: 16)")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="longest wait for windows in seconds (default: 600)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
