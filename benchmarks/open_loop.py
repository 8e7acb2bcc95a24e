"""Send requests at given times without waiting for earlier ones, and record their outcomes."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles

from benchmarks.client import Client
from benchmarks.workloads import Exchange, WrongAnswer

GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: its time (seconds from the beginning) and its response. ``status`` 0: no response."""

    at: float
    took_ms: float
    status: int
    reason: str = ""

    @property
    def good(self) -> bool:
        """True if the request succeeded."""
        return self.status == 200


async def offer(
    port: int, exchange: Exchange, times: Sequence[float], until: Callable[[], bool] | None = None
) -> list[Asked]:
    """Send a request at each of ``times`` (seconds from now) and wait for all answers.

    ``until``: stop sending when it returns True.
    """
    client, begun = Client(port), time.monotonic()
    asked: list[Asked] = []
    tasks: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        asked.append(await _ask(client, exchange, begun))

    try:
        for at in times:
            await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
            if until is not None and until():
                break
            task = asyncio.create_task(ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    finally:
        client.close()
    return sorted(asked, key=lambda each: each.at)


async def _ask(client: Client, exchange: Exchange, begun: float) -> Asked:
    sent = time.monotonic()

    def found(status: int, reason: str = "") -> Asked:
        return Asked(sent - begun, (time.monotonic() - sent) * 1e3, status, reason)

    try:
        async with asyncio.timeout(GRACE_S):
            answer = await client.post(exchange.path, exchange.body, exchange.headers)
    except TimeoutError:
        return found(0, "no answer")
    except (OSError, EOFError) as error:
        return found(0, f"connection broken: {error!r}")
    if answer.status != 200:
        return found(answer.status, str(json.loads(answer.body).get("reason", answer.status)))
    try:
        exchange.check(answer.headers, answer.body)
    except WrongAnswer as wrong:
        return found(0, str(wrong))
    return found(200)


def failures(asked: Sequence[Asked]) -> dict[str, int]:
    """Return the number of failed requests by reason."""
    return dict(Counter(each.reason for each in asked if not each.good))


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile of the values; 0 if there are no values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return quantiles(values, n=100, method="inclusive")[percent - 1]
