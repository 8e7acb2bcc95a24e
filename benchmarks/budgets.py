"""``python -m benchmarks.budgets``: check that a budget of money holds over eight gateway processes.

200 callers with one key send requests to a model that sleeps 20 ms, each one again as soon as it has an
answer, until the budget is used up. The sum of the costs in the answers may pass the budget by no more than
one lease of a process: the requests of 0.1 seconds, each at its cost alone in a replica.

Then the Deployment gets a budget that is used up already. It must lose its replicas and refuse requests, and
serve again when the budget is raised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import options, report, session, sleeper, stack
from benchmarks.client import Client
from benchmarks.errors import BenchmarkFailed
from benchmarks.stack import Stack

GATEWAYS, CALLERS, REPLICAS = 8, 200, 2
# A refused caller retries after this pause. It gives up after this many refusals in a row.
PAUSE_S, REFUSALS = 0.3, 12
LEASE_S = 0.1
FACTS_S = 60.0
HEADER = "x-tidegate-cost"


@dataclass(slots=True)
class Spending:
    """The answers of one run. Costs are in the currency of the price list."""

    costs: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.monotonic)
    last_at: float = 0.0

    @property
    def spent(self) -> float:
        """Return the sum of the costs."""
        return sum(self.costs)

    def note(self, status: int, headers: Mapping[str, str], body: bytes) -> bool:
        """Note an answer. Return True if the request was accepted."""
        reason = "" if status == 200 else str(json.loads(body).get("reason", ""))
        self.statuses[f"{status} {reason}".strip()] += 1
        if status == 200:
            self.costs.append(float(headers[HEADER].split()[0]))
            self.last_at = time.monotonic()
        return status == 200


def main() -> int:
    """Measure, print, write budgets.json. Return 1 if the bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    extra = {"TIDEGATE_GATEWAY_WORKERS": str(GATEWAYS), "TIDEGATE_COST_HEADER": "true"}
    with session.session(), stack.tidegate("budgets", extra) as running:
        sleeper.deploy(running, replicas=REPLICAS, max_batch=8)
        figures = asyncio.run(measure(running, chosen.requests))
        figures |= asyncio.run(stop_and_serve(running))
    over = figures["spent"] - figures["budget"]
    verdicts = [
        (
            "PASS" if over <= figures["lease"] else "MISS",
            f"the budget is passed by {over / figures['budget']:.3%}; one lease is "
            f"{figures['lease'] / figures['budget']:.3%}",
        ),
        (
            "PASS" if figures["spent"] >= 0.9 * figures["budget"] else "MISS",
            f"{figures['spent'] / figures['budget']:.1%} of the budget could be spent",
        ),
        (
            "PASS" if figures["stopped_reason"] == "budget_exhausted" else "MISS",
            f"a Deployment over its budget refused after {figures['stopped_s']:.0f} s "
            f"({figures['stopped_reason']}, {figures['stopped_replicas']} replicas), and served "
            f"{figures['served_s']:.0f} s after it was raised",
        ),
    ]
    print(f"\n{report.machine_line(machine)}\n")
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    print("\n" + "\n".join(f"{verdict}  {text}" for verdict, text in verdicts))
    out: Path = chosen.out / "budgets.json"
    report.write_json(out, {"machine": machine, "figures": figures, "bars": verdicts})
    print(f"\nResults: {out}")
    return 1 if any(verdict == "MISS" for verdict, _ in verdicts) else 0


async def measure(running: Stack, requests: int) -> dict[str, Any]:
    """Spend a budget of about ``requests`` requests with all callers."""
    price = await _price(running)
    budget = requests * price
    made = json.loads(
        running.command("keys", "create", "spender", "--budget-per-day", f"{budget:.9f}", "--json")
    )
    found = Spending()
    client = Client(running.gateway_port)
    await asyncio.sleep(3.0)  # every gateway process reads the new key
    found.began = time.monotonic()
    try:
        await asyncio.gather(*(_spend(client, made["key"], found) for _ in range(CALLERS)))
    finally:
        client.close()
    seconds = max(found.last_at - found.began, 0.1)
    return {
        "budget": budget,
        "spent": found.spent,
        "lease": len(found.costs) / seconds * LEASE_S / GATEWAYS * price,
        "answers": dict(found.statuses),
        "cost_of_a_request": found.spent / max(1, len(found.costs)),
        "seconds": seconds,
    }


async def stop_and_serve(running: Stack) -> dict[str, Any]:
    """Give the Deployment a budget that is used up, and raise the budget again."""
    change = ("policy", "sleep", "--set")
    began = time.monotonic()
    await asyncio.to_thread(
        running.command, *change, "max_cost_per_day=0.000000001", "--set", "over_budget=stop"
    )
    reason = await _until(running, refused=True)
    stopped_s = time.monotonic() - began
    async with asyncio.timeout(FACTS_S):
        while (left := _replicas(await asyncio.to_thread(running.command, "deployments", "--json"))) > 0:
            await asyncio.sleep(0.5)
    began = time.monotonic()
    await asyncio.to_thread(running.command, *change, "max_cost_per_day=")
    await _until(running, refused=False)
    return {
        "stopped_s": stopped_s,
        "stopped_reason": reason,
        "stopped_replicas": left,
        "served_s": time.monotonic() - began,
    }


def _replicas(listed: str) -> int:
    (found,) = json.loads(listed)["items"]
    return int(found["ready"] + found["starting"])


async def _until(running: Stack, *, refused: bool) -> str:
    """Send requests until one is refused because of the budget, or succeeds. Return its reason."""
    client, exchange, reason = Client(running.gateway_port), sleeper.exchange(), ""
    try:
        async with asyncio.timeout(FACTS_S):
            while True:
                answer = await client.post(exchange.path, exchange.body, exchange.headers)
                reason = "" if answer.status == 200 else str(json.loads(answer.body).get("reason", ""))
                if (reason == "budget_exhausted") if refused else not reason:
                    return reason
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise BenchmarkFailed(f"after {FACTS_S:g} s the last answer was {reason or 'accepted'}") from None
    finally:
        client.close()


async def _price(running: Stack) -> float:
    """Return the cost of a request, when the gateways know what a replica costs."""
    client, exchange = Client(running.gateway_port), sleeper.exchange()
    until = time.monotonic() + FACTS_S
    try:
        while time.monotonic() < until:
            answer = await client.post(exchange.path, exchange.body, exchange.headers)
            if answer.status == 200 and (cost := float(answer.headers[HEADER].split()[0])) > 0:
                return cost
            await asyncio.sleep(0.5)
    finally:
        client.close()
    raise BenchmarkFailed(f"no gateway knew what a replica costs within {FACTS_S:g} s")


async def _spend(client: Client, key: str, found: Spending) -> None:
    """Send requests until too many in a row were refused."""
    exchange, refused = sleeper.exchange(), 0
    headers = {**exchange.headers, "Authorization": f"Bearer {key}"}
    while refused < REFUSALS:
        answer = await client.post(exchange.path, exchange.body, headers)
        if found.note(answer.status, answer.headers, answer.body):
            refused = 0
        else:
            refused += 1
            await asyncio.sleep(PAUSE_S)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="size of the budget (default: 10,000)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
