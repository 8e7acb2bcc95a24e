"""``python -m benchmarks.long_job``: run a job of 150 s on a broker whose consumer_timeout is 5 s.

Another consumer holds a message without an ack, and the broker closes its channel. The channel of the job's
worker must stay open, the job must run once, and its result must be right.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import options, report, session, stack
from tidegate import AsyncClient
from tidegate.kernel import credentials, tasks
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import requests_queue

MODEL = "long"
HELD = requests_queue("benchmark-held")


@dataclass(frozen=True, slots=True)
class Outcome:
    """``closed_after_s``: when the broker closed the other consumer's channel; None: it did not."""

    status: str
    attempts: int
    right: bool
    took_s: float
    closed_after_s: float | None

    @property
    def met(self) -> bool:
        """True if the broker closed the other channel, and the job ran only once."""
        good = self.status == "succeeded" and self.attempts == 1 and self.right
        return good and self.closed_after_s is not None


def main() -> int:
    """Run, print, write long_job.json. Return 1 if the job's first attempt did not succeed."""
    chosen = _arguments()
    machine = report.machine()
    setting = {"TIDEGATE_ACK_TIMEOUT_S": str(chosen.ack_timeout)}
    with session.session(), stack.tidegate("long-job", setting) as running:
        running.deploy(stack.EXAMPLES / "sleep" / "model.py", MODEL)
        print(f"serving; a job of {chosen.length:g} s, consumer_timeout {chosen.ack_timeout:g} s", flush=True)
        outcome = asyncio.run(_run(running, chosen.length))
    closed = outcome.closed_after_s
    shown = "never" if closed is None else f"after {closed:.0f} s"
    print(f"the other consumer's channel was closed: {shown}")
    print(f"the job: {outcome.status} after {outcome.took_s:.1f} s, attempts: {outcome.attempts}")
    print(f"{'PASS' if outcome.met else 'MISS'}  one attempt, the right result")
    report.write_json(chosen.out / "long_job.json", {"machine": machine, **asdict(outcome)})
    return 0 if outcome.met else 1


async def _run(running: stack.Stack, length_s: float) -> Outcome:
    holding = asyncio.create_task(
        _hold(
            running.server_url(credentials.RABBITMQ, "worker"),
            running.server_url(credentials.RABBITMQ, "gateway"),
        )
    )
    ms, began = np.array([[length_s * 1e3]], "<f4"), time.monotonic()
    async with AsyncClient(running.url) as client:
        job = await client.submit(MODEL, {"ms": ms})
        status = await job.wait()
        took_s = time.monotonic() - began
        right = status == "succeeded" and (await job.result())["slept"].tolist() == ms.tolist()
    closed_after_s = holding.result() if holding.done() else None
    await tasks.end(holding)
    return Outcome(status, job.document["attempts"], right, took_s, closed_after_s)


async def _hold(consuming: str, publishing: str) -> float:
    """Hold a message until the broker closes the channel. Return the seconds that this took."""
    closed = asyncio.Event()

    def on_delivery(_: Delivery) -> None:
        return None

    async def setup(channel: Channel) -> None:
        await channel.declare(HELD, bind=False)
        await channel.consume(HELD, on_delivery, prefetch=1)

    async def nothing(_: Channel) -> None:
        return

    async with (
        Connection(consuming, "holder", setup, closed.set) as holder,
        Connection(publishing, "publisher", nothing) as publisher,
    ):
        await holder.wait_up(20)
        await (await publisher.wait_up(20)).publish(b"held", routing_key=HELD.name)
        began = time.monotonic()
        await closed.wait()
        return time.monotonic() - began


def _arguments() -> Any:
    parser: argparse.ArgumentParser = options.parser(__doc__)
    parser.add_argument("--length", type=float, default=150.0, help="of the job, in seconds (default: 150)")
    parser.add_argument(
        "--ack-timeout",
        type=float,
        default=5.0,
        help="the broker's timeout for an ack, in seconds (default: 5)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
