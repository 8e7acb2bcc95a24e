"""``python -m benchmarks.chaos``: 20,000 jobs while every part is killed with -9 and restarted once.

A client submits jobs with different inputs and keeps a list of the 202s that it received. Meanwhile RabbitMQ,
both Valkeys, all services, the worker and its Triton are killed. At the end, the list is compared with the
records, each result is compared with its input, and the received webhooks are counted by id.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from dataclasses import asdict

from benchmarks import options, report, session, stack
from benchmarks.chaos import course, gauge, kills, verdict


def main() -> int:
    """Run, print, write chaos.json. Return 1 if a bar is missed."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("chaos", course.SETTINGS) as running:
        running.deploy(stack.MODELS / "echo" / "model.py", course.MODEL, replicas=chosen.workers)
        print(f"serving; {chosen.jobs:,} jobs at {chosen.rate:g}/s", flush=True)
        outcome = asyncio.run(course.run(running, chosen.jobs, chosen.rate, chosen.kill))
    seen, bars = outcome.evidence, verdict.judge(outcome.evidence)
    states = Counter(record["status"] for record in seen.records)
    attempts = Counter(record["attempts"] for record in seen.records)
    again = sum(count - 1 for count in seen.deliveries.values())
    print(f"\n{report.machine_line(machine)}")
    print(f"{seen.jobs:,} jobs in {outcome.seconds:.0f} s; records by state: {dict(states)}")
    print(f"attempts: {dict(sorted(attempts.items()))}; answers other than 202: {outcome.trouble}")
    print(f"webhooks: {len(seen.deliveries):,} ids, {again:,} delivered again under the same id")
    print(f"ledger, read every {gauge.EVERY_S:g} s: {dict(seen.gauge)}")
    print(verdict.lines(bars))
    document = {
        "machine": machine,
        "jobs": seen.jobs,
        "seconds": outcome.seconds,
        "kills": [asdict(kill) for kill in outcome.kills],
        "states": dict(states),
        "attempts": dict(attempts),
        "trouble": outcome.trouble,
        "webhooks": {"ids": len(seen.deliveries), "again": again},
        "gauge": dict(seen.gauge),
        "ledger": seen.ledger,
        "bars": {bar.text: bar.met for bar in bars},
    }
    report.write_json(chosen.out / "chaos.json", document)
    return 0 if all(bar.met for bar in bars) else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--jobs", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--rate", type=float, default=300.0, help="submitted per second (default: 300)")
    parser.add_argument("--workers", type=int, default=1, help="replicas of the model (default: 1)")
    parser.add_argument(
        "--kill",
        type=options.names(kills.PARTS),
        default=list(kills.PARTS),
        help="which parts (default: all)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
