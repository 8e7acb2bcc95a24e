"""``python -m benchmarks.amqp_drivers``: compare two AMQP drivers by time and CPU per message.

One process publishes and consumes, on two connections to its own RabbitMQ. Messages are confirmed and
mandatory, like those of jobs. CPU time is that of this process, without RabbitMQ.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

import uvloop

from benchmarks import options, report, session
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import Queue
from tidegate.stack.standalone import rabbitmq_running

DRIVERS = {"fast": True, "aio-pika": False}


async def _setup_nothing(_: Channel) -> None:
    return


async def measure(url: str, fast: bool, size: int, in_flight: int, messages: int) -> tuple[float, float]:
    """Return the time and the CPU time of one message, in microseconds."""
    queue, body = Queue(f"benchmark-{fast}-{size}-{in_flight}"), bytes(size)
    arrived = asyncio.Semaphore(0)

    async def setup(channel: Channel) -> None:
        def on_delivery(delivery: Delivery) -> None:
            channel.ack(delivery.tag)
            arrived.release()

        await channel.declare(queue)
        await channel.consume(queue, on_delivery, prefetch=1000)

    async with (
        Connection(url, "benchmark-in", setup, fast=fast) as consuming,
        Connection(url, "benchmark-out", _setup_nothing, fast=fast) as publishing,
    ):
        await consuming.wait_up(60)
        channel = await publishing.wait_up(60)

        async def send(count: int) -> None:
            for _ in range(count):
                await channel.publish(body, routing_key=queue.name, mandatory=True)
                await arrived.acquire()

        await asyncio.gather(*(send(20) for _ in range(in_flight)))  # warm up
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(send(messages // in_flight) for _ in range(in_flight)))
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    count = messages // in_flight * in_flight
    return wall / count * 1e6, cpu / count * 1e6


def main() -> int:
    """Measure both drivers alternately, print the medians, and write amqp_drivers.json."""
    chosen = _arguments()
    found: list[dict[str, object]] = []
    with session.session(), tempfile.TemporaryDirectory() as folder, rabbitmq_running(Path(folder)) as url:
        print(f"{'size':>8} {'in flight':>10} {'driver':>9} {'us/message':>11} {'CPU us':>7}")
        for size in chosen.sizes:
            for in_flight in chosen.in_flight:
                rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in DRIVERS}
                for _ in range(chosen.repeats):
                    for name, fast in DRIVERS.items():
                        figures = uvloop.run(measure(url, fast, size, in_flight, chosen.messages))
                        rounds[name].append(figures)
                for name, figures_of in rounds.items():
                    wall, cpu = (median(column) for column in zip(*figures_of, strict=True))
                    print(f"{size:>8} {in_flight:>10} {name:>9} {wall:>11.0f} {cpu:>7.0f}", flush=True)
                    found.append(
                        {"size": size, "in_flight": in_flight, "driver": name, "us": wall, "cpu_us": cpu}
                    )
    report.write_json(chosen.out / "amqp_drivers.json", {"machine": report.machine(), "results": found})
    return 0


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__, repeats=3)
    parser.add_argument("--messages", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument(
        "--sizes", type=options.numbers, default=[400, 65536], help="bytes (default: 400,65536)"
    )
    parser.add_argument("--in-flight", type=options.numbers, default=[1, 64], help="messages (default: 1,64)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
