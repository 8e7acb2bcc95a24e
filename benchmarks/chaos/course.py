"""The course of the benchmark: submit jobs, kill parts, wait for the end, collect all results."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.client import JobsClient
from benchmarks.chaos.gauge import Gauge
from benchmarks.chaos.kills import Kill, Killer
from benchmarks.chaos.receiver import Receiver
from benchmarks.chaos.verdict import Evidence
from benchmarks.client import Client
from benchmarks.errors import BenchmarkFailed
from benchmarks.stack import Stack

MODEL = "echo"
END_LIMIT_S = 300.0
POLL_S = 0.5
# A reading of the ledger takes a bit more than a second.
LOOK_S, LEDGER_LIMIT_S = 3.0, 60.0

# Webhooks may go to this machine, where the receiver is. All other settings have their defaults.
SETTINGS = {"TIDEGATE_WEBHOOK_ALLOW_PRIVATE": "true"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results: the evidence, the seconds, the kills, and the counts of responses other than 202."""

    evidence: Evidence
    seconds: float
    kills: list[Kill]
    trouble: dict[str, int]


async def run(stack: Stack, jobs: int, rate: float, parts: Sequence[str]) -> Outcome:
    """Run the whole course on a stack that serves the echo model. Raise BenchmarkFailed if it hangs."""
    secret = stack.command("webhook-secret").strip()
    killer, gauge = Killer(stack), Gauge(stack)
    async with Receiver(secret) as receiver:
        client = JobsClient(stack.gateway_port, MODEL, receiver.url)
        following = asyncio.create_task(gauge.follow())
        try:
            began = time.monotonic()
            submitting = asyncio.create_task(client.submit(jobs, rate))
            await _kill_on_the_way(killer, client, parts, jobs, began, submitting)
            await submitting
            await _until_told(receiver, client)
            seconds = time.monotonic() - began
            following.cancel()
            await gauge.settle(60.0)
            evidence = Evidence(
                jobs=jobs,
                told=client.told,
                records=await client.records(),
                results=await client.results(),
                webhook_ids=receiver.ids_of,
                deliveries=receiver.ids,
                forged=receiver.forged,
                gauge=gauge.readings,
                gauge_last=gauge.last,
                ledger=await _ledger(stack),
            )
            return Outcome(evidence, seconds, killer.kills, dict(client.trouble))
        finally:
            following.cancel()
            client.close()
            gauge.close()
            killer.close()


async def _kill_on_the_way(
    killer: Killer,
    client: JobsClient,
    parts: Sequence[str],
    jobs: int,
    began: float,
    submitting: asyncio.Task[None],
) -> None:
    """Kill each part once, at even distances among the jobs. Wait until it is back before the next kill."""
    for at, part in enumerate(parts, 1):
        while len(client.told) < jobs * at / (len(parts) + 1) and not submitting.done():
            await asyncio.sleep(0.05)
        await killer.kill(part, began, lambda: len(client.told))


async def _until_told(receiver: Receiver, client: JobsClient) -> None:
    """Wait until every accepted job has sent its webhook, or until none has arrived for a long time."""
    last, since = -1, time.monotonic()
    while len(receiver.ids_of) < len(client.told):
        if len(receiver.ids_of) != last:
            last, since = len(receiver.ids_of), time.monotonic()
        if time.monotonic() - since > END_LIMIT_S:
            return  # the verdict shows what is missing
        await asyncio.sleep(POLL_S)


async def _ledger(stack: Stack) -> dict[str, Any]:
    """Return the result of a reading of the ledger that begins after this call."""
    client = Client(int(stack.env["TIDEGATE_ROUTER_PORT"]))
    token = (stack.state / "token").read_text().strip()
    since = time.time() + LOOK_S
    try:
        async with asyncio.timeout(LEDGER_LIMIT_S):
            while True:
                answer = await client.get("/v1/ledger", {"Authorization": f"Bearer {token}"})
                found: dict[str, Any] = json.loads(answer.body)
                if found["at"] > since and found["unaccounted"] is not None:
                    return found
                await asyncio.sleep(POLL_S)
    except (OSError, EOFError, ValueError) as error:
        raise BenchmarkFailed(f"the router does not return its ledger: {error!r}") from error
    finally:
        client.close()
