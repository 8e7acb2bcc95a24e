"""``python -m benchmarks.rate_limit``: check one limit over four gateway processes, and its cost.

A key with a limit of 100 requests a second gets 1,000 a second for a minute, on 64 connections that the
kernel distributes to the processes. The accepted requests may be no more than the rate and the burst allow,
and no less than 98% of the rate. Then the store of live facts hangs for a while, and each process uses its
share of the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import options, report, session, stack
from benchmarks.client import Client
from benchmarks.stack import Stack
from services.gateway.application.access import Access
from services.gateway.domain.key_limiter import KeyLimiter
from services.gateway.domain.key_table import KeyTable
from tidegate.kernel.protocol.access import Allowance, Key, Principal, digest_of

CONNECTIONS = 64
LEAST = 0.98
COST_BAR_US = 5.0
COST_ROUNDS, COST_CALLS = 7, 100_000
AWAY_S = 10.0
# The longest delay until a process notices that the store does not answer, or answers again.
SETTLE_S = 2.0
INPUT = {"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [[0.5] * 16]}
BODY = json.dumps({"inputs": [INPUT]}).encode()
PATH = "/v2/models/echo/infer"


@dataclass(slots=True)
class Step:
    """The outcomes of the offered requests. ``by_second``: the accepted ones in each second."""

    name: str
    offered: int = 0
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    by_second: Counter[int] = field(default_factory=Counter)
    retry_after: Counter[str] = field(default_factory=Counter)

    @property
    def accepted(self) -> int:
        """The number of accepted requests."""
        return self.statuses[200]

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the step."""
        return {
            "name": self.name,
            "offered": self.offered,
            "seconds": round(self.seconds, 2),
            "accepted": self.accepted,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "by_second": [self.by_second[second] for second in range(int(self.seconds))],
            "retry_after_s": dict(self.retry_after),
        }


def main() -> int:
    """Measure, print, write rate_limit.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    costs = {name: cost(call) for name, call in cases().items()}
    workers = {"TIDEGATE_GATEWAY_WORKERS": str(chosen.gateways)}
    with session.session(), stack.tidegate("rate-limit", workers) as running:
        running.deploy(stack.MODELS / "echo" / "model.py", "echo")
        steps = asyncio.run(measure(running, chosen))
    verdicts = judge(steps, costs, chosen)
    print(f"\n{report.machine_line(machine)}; {chosen.gateways} gateway processes, {CONNECTIONS} connections")
    print(
        f"one key: {chosen.rate:g}/s, burst {chosen.burst}; offered {chosen.offered:g}/s\n\n{_table(steps)}\n"
    )
    print("\n".join(f"{us:6.2f} us  {name}" for name, us in costs.items()), end="\n\n")
    print("\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "rate_limit.json"
    document = {"steps": [step.to_json() for step in steps], "cost_us": costs, "bars": verdicts}
    report.write_json(out, {"machine": machine, "rate": chosen.rate, "burst": chosen.burst} | document)
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


async def measure(running: Stack, chosen: argparse.Namespace) -> list[Step]:
    """Run the step with the store, and the step without it."""
    steps = []
    for name, seconds in (("shared", float(chosen.seconds)), ("store away", chosen.away)):
        if not seconds:
            continue
        made = running.command(
            "keys", "create", name, "--rate", f"{chosen.rate:g}", "--burst", str(chosen.burst), "--json"
        )
        clients = [Client(running.gateway_port) for _ in range(CONNECTIONS)]
        headers = {"Authorization": f"Bearer {json.loads(made)['key']}"}
        await _known(clients, headers, chosen)
        step = Step(name)
        away = asyncio.create_task(_keep_away(running, seconds)) if name == "store away" else None
        if away is not None:
            await asyncio.sleep(SETTLE_S)
        await offer(clients, headers, step, chosen.offered, seconds)
        if away is not None:
            await away
        for client in clients:
            client.close()
        steps.append(step)
        print(f"  {name}: {step.accepted} of {step.offered} in {step.seconds:.1f} s", flush=True)
    return steps


async def _known(clients: list[Client], headers: dict[str, str], chosen: argparse.Namespace) -> None:
    """Send requests on every connection until each process knows the key. Then let the bucket refill."""
    while True:
        answers = await asyncio.gather(*(client.post(PATH, BODY, headers) for client in clients))
        if all(answer.status != 401 for answer in answers):
            break
        await asyncio.sleep(0.2)
    await asyncio.sleep(2 * chosen.burst / chosen.rate + 2.0)


async def offer(
    clients: list[Client], headers: dict[str, str], step: Step, per_s: float, seconds: float
) -> None:
    """Send requests at a steady rate without waiting for earlier ones."""
    began = time.monotonic()

    async def ask(client: Client) -> None:
        answer = await client.post(PATH, BODY, headers)
        step.statuses[answer.status] += 1
        if answer.status == 200:
            step.by_second[int(time.monotonic() - began)] += 1
        elif answer.status == 429:
            step.retry_after[answer.headers["retry-after"]] += 1

    tasks: set[asyncio.Task[None]] = set()
    step.offered = round(per_s * seconds)
    for number in range(step.offered):
        late = time.monotonic() - began - number / per_s
        if late < 0:
            await asyncio.sleep(-late)
        task = asyncio.create_task(ask(clients[number % len(clients)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    step.seconds = time.monotonic() - began


async def _keep_away(running: Stack, seconds: float) -> None:
    """Pause the live facts' Valkey with SIGSTOP, like a machine that hangs, until the step is over."""
    record = json.loads((running.state / "run" / "stack.json").read_text())
    (pid,) = [child["process"]["pid"] for child in record["children"] if child["name"] == "valkey"]
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(SETTLE_S + seconds + 1.0)
    finally:
        os.kill(pid, signal.SIGCONT)


def cases() -> dict[str, Callable[[], None]]:
    """Return functions that process one request each, by the kind of limit."""
    key = f"tg_ab12_{'x' * 43}".encode()
    headers = {b"host": b"x", b"authorization": b"Bearer " + key}
    counts = [0] * 7
    found: dict[str, Callable[[], None]] = {}

    def add(name: str, allowance: Allowance, given: dict[bytes, bytes], tell: bool) -> None:
        limiter = KeyLimiter("ab12", allowance, lambda _: None)
        limiter.slots = allowance.concurrency or 0
        for kind in (limiter.rate, limiter.day_quota, limiter.month_quota):
            if kind is not None:
                kind.held = 10**9
        limiters = {} if allowance.unlimited else {"ab12": limiter}
        access = Access(required=False, service_token="t", count=lambda *_: counts, limiters=limiters)
        who = Principal("ab12", "bench", frozenset({"infer"}))
        access.replace(KeyTable("1", {"ab12": Key(who, digest_of(key), allowance=allowance)}))

        def call() -> None:
            grant = access.admit(access.authenticate(given), "echo")
            if grant is not None and tell:
                grant.headers()
                grant.done(compute_us=10, received=100, sent=100)
            elif grant is not None:
                grant.cancel()

        found[name] = call

    every = Allowance(1e9, 10**9, 100, 10**12, 10**12)
    add("no key: loopback without a credential", Allowance(), {b"host": b"x"}, False)
    add("a key without limits, accepted", Allowance(), headers, False)
    add("a key with a rate, accepted", Allowance(1e9, 10**9), headers, False)
    add("a key with rate, concurrency, day and month, accepted", every, headers, False)
    add("the same, with usage counted and headers of the remaining limits", every, headers, True)
    return found


def cost(call: Callable[[], None]) -> float:
    """Return the microseconds of a call: the best of several rounds, as other processes share the machine."""
    best = float("inf")
    for _ in range(COST_ROUNDS):
        began = time.perf_counter()
        for _ in range(COST_CALLS):
            call()
        best = min(best, (time.perf_counter() - began) / COST_CALLS)
    return best * 1e6


def judge(steps: list[Step], costs: dict[str, float], chosen: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the bars: the budget of each step, only 200 and 429, and the cost of a key."""
    verdicts = []
    for step in steps:
        # The last request is sent at the end of the step. Requests answered later were accepted before.
        minimum = LEAST * chosen.rate * step.offered / chosen.offered
        most = chosen.rate * step.seconds + chosen.burst
        well = minimum <= step.accepted <= most and set(step.statuses) <= {200, 429}
        text = f"{step.name}: {step.accepted} accepted, {minimum:.0f} to {most:.0f} is right"
        verdicts.append(("PASS" if well else "MISS", text))
    worst = max(us for name, us in costs.items() if name.endswith("let in"))
    text = f"authentication and admission of a known key take {worst:.2f} us, at most {COST_BAR_US:g}"
    verdicts.append(("PASS" if worst <= COST_BAR_US else "MISS", text))
    return verdicts


def _table(steps: list[Step]) -> str:
    rows = []
    for step in steps:
        seconds = [step.by_second[second] for second in range(1, int(step.seconds))]
        spread = f"{min(seconds)}..{max(seconds)}" if seconds else "-"
        rows.append(
            [
                step.name,
                str(step.offered),
                f"{step.seconds:.1f}",
                str(step.accepted),
                str(step.statuses[429]),
                spread,
            ]
        )
    return report.table(["", "offered", "seconds", "let in", "429", "accepted in a second"], rows)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, seconds=60)
    parser.add_argument("--gateways", type=int, default=4, help="gateway processes (default: 4)")
    parser.add_argument("--rate", type=float, default=100.0, help="of the key, per second (default: 100)")
    parser.add_argument("--burst", type=int, default=100, help="of the key (default: 100)")
    parser.add_argument("--offered", type=float, default=1000.0, help="requests per second (default: 1000)")
    parser.add_argument("--away", type=float, default=AWAY_S, help="seconds without the store; 0: never")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
