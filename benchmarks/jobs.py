"""``python -m benchmarks.jobs``: compare jobs per second with FastAPI + Celery.

One Tidegate stack runs all the time. Celery has its own RabbitMQ and Valkey with the same settings, because
those of the stack accept only its services. In each round, wrk submits jobs of the identity model to each
candidate for some seconds while the worker runs them. Then the benchmark waits until all are done. Load
generator, gateway, broker, store, worker and Triton share the machine's cores.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import load, options, report, server, session, stack, workloads
from benchmarks.errors import BenchmarkFailed
from benchmarks.peer import all_peers
from benchmarks.stack import Stack
from benchmarks.workloads import Exchange
from tidegate.kernel import credentials
from tidegate.kernel.store import JobStore
from tidegate.stack.standalone import jobs_running, rabbitmq_running, valkey_running

BAR = 3_000
DRAIN_LIMIT_S = 300.0
POLL_S = 0.05
TITLES = {
    "tidegate": "Tidegate: fsynced record, confirmed by a quorum queue",
    "celery": "FastAPI + Celery, with its defaults: nothing is confirmed or synced",
    "celery-durable": "FastAPI + Celery, quorum queue, confirms, results synced",
}


class Incomplete(BenchmarkFailed):
    """Some accepted jobs were not done."""


@dataclass(frozen=True, slots=True)
class Round:
    """One candidate in one round. Rates are per second; ``done``: from the first job to the last result."""

    candidate: str
    connections: int
    jobs: int
    accepted: float
    p50_ms: float
    p99_ms: float
    done: float
    errors: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """The address for submitting jobs, and a count of the jobs done since the start."""

    name: str
    url: str
    exchange: Exchange
    done: Callable[[], int]


def main() -> int:
    """Measure, print the table, write jobs.json. Return 1 if the bar is missed."""
    parser = options.parser(__doc__, seconds=10, repeats=3)
    parser.add_argument("--connections", type=int, default=128, help="concurrent connections (default: 128)")
    parser.add_argument(
        "--only", type=options.names(list(TITLES)), default=list(TITLES), help=", ".join(TITLES)
    )
    chosen = parser.parse_args()
    machine, rounds = report.machine(), []
    with session.session(), stack.tidegate("jobs") as running:
        running.deploy(stack.EXAMPLES / "identity" / "model.py", "identity")
        for number in range(chosen.repeats):
            for name in chosen.only:
                with candidate(name, running) as found:
                    rounds.append(measure(found, chosen.connections, chosen.seconds))
                print(f"round {number + 1}: {line(rounds[-1])}", flush=True)
    return conclude(chosen.only, rounds, machine, chosen)


@contextmanager
def candidate(name: str, running: Stack) -> Iterator[Candidate]:
    """Yield a candidate that accepts jobs. Start Celery; Tidegate runs already. Raise NotServing."""
    if name == "tidegate":
        url = running.server_url(credentials.VALKEY_JOBS, "router")
        exchange = workloads.exchange("identity", "oip")
        asked = replace(exchange, headers=exchange.headers | {"Prefer": "respond-async"})
        yield Candidate(name, running.url, asked, lambda: asyncio.run(_ended(url)))
        return
    durable = name == "celery-durable"
    (peer,) = [peer for peer in all_peers() if peer.name == "celery"]
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-celery-")))
        store = jobs_running(folder / "store") if durable else valkey_running(folder / "store")
        given = {
            "BENCH_AMQP_URL": held.enter_context(rabbitmq_running(folder / "broker")),
            "BENCH_REDIS_URL": held.enter_context(store),
            "BENCH_QUEUE": f"celery-{name}",
            **({"BENCH_DURABLE": "1"} if durable else {}),
        }
        url = held.enter_context(server.process(peer, given))
        server.check(server.Served(url), peer, "identity")
        exchange = workloads.exchange("identity", "plain")
        asked = replace(exchange, path="/jobs/identity")
        yield Candidate(name, url, asked, lambda: _celery_done(url))


async def _ended(url: str) -> int:
    store = JobStore.connect(url)
    try:
        ledger = (await store.counts()).ledger
    finally:
        await store.close()
    return sum(ledger.get(end, 0) for end in ("succeeded", "failed", "cancelled", "expired"))


def _celery_done(url: str) -> int:
    with urllib.request.urlopen(f"{url}/jobs/done", timeout=30) as answer:
        return int(json.load(answer)["done"])


def measure(found: Candidate, connections: int, seconds: int) -> Round:
    """Submit jobs for some seconds, then wait until all are done. Raise Incomplete or LoadFailed."""
    load.warm(found.url, found.exchange, connections)
    before = _settled(found)
    began = time.monotonic()
    figures = load.measure(found.url, found.exchange, connections, seconds)
    accepted = figures.requests - figures.errors
    deadline = time.monotonic() + DRAIN_LIMIT_S
    while (done := found.done() - before) < accepted:
        if time.monotonic() > deadline:
            raise Incomplete(f"{found.name}: {accepted} jobs were accepted, {done} are done")
        time.sleep(POLL_S)
    took = time.monotonic() - began
    return Round(
        found.name,
        connections,
        accepted,
        figures.rate,
        figures.p50_ms,
        figures.p99_ms,
        accepted / took,
        figures.errors,
    )


def _settled(found: Candidate) -> int:
    """Wait until the number of done jobs no longer changes. Return it."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 1.0:
        if (now := found.done()) != last:
            last, since = now, time.monotonic()
        time.sleep(POLL_S)
    return last


def line(found: Round) -> str:
    """Return a round as one line."""
    return (
        f"{found.candidate}: {found.jobs} jobs, accepted {found.accepted:,.0f}/s (p50 {found.p50_ms:.1f} ms, "
        f"p99 {found.p99_ms:.1f} ms), done {found.done:,.0f}/s, {found.errors} errors"
    )


def conclude(names: list[str], rounds: list[Round], machine: dict[str, Any], chosen: Any) -> int:
    """Print and write the medians. Return 1 if Tidegate accepts too few jobs or anything failed."""
    rows, medians = [], {}
    for name in names:
        own = [found for found in rounds if found.candidate == name]
        medians[name] = {
            field: median(getattr(found, field) for found in own)
            for field in ("accepted", "done", "p50_ms", "p99_ms")
        }
        cells = medians[name]
        rows.append(
            [
                TITLES[name],
                f"{cells['accepted']:,.0f}",
                f"{cells['done']:,.0f}",
                f"{cells['p50_ms']:.1f}",
                f"{cells['p99_ms']:.1f}",
                str(sum(found.errors for found in own)),
            ]
        )
    head = ["", "accepted/s", "done/s", "p50 ms of the 202", "p99 ms", "errors"]
    print(f"\n{report.machine_line(machine)}; {chosen.connections} connections, {chosen.seconds} s a round\n")
    print(report.table(head, rows))
    report.write_json(
        chosen.out / "jobs.json",
        {"machine": machine, "medians": medians, "rounds": [asdict(found) for found in rounds]},
    )
    if "tidegate" not in medians:
        return 0
    met = medians["tidegate"]["accepted"] >= BAR and not any(found.errors for found in rounds)
    print(f"\n{'PASS' if met else 'MISS'}: at least {BAR:,} accepted jobs/s, without an error")
    return 0 if met else 1


if __name__ == "__main__":
    session.run(main)
