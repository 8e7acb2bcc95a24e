"""``python -m benchmarks.mixups``: check that every caller gets the answer to its own request.

64 concurrent callers send requests of different sizes, half of them in JSON and half binary. Every input is
different, and every answer is compared with its own input, bit for bit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import options, report, session, stack
from benchmarks.client import Answer, Client
from benchmarks.workloads import HEADER_LENGTH

PATH = "/v2/models/echo/infer"
ROWS = (1, 1, 1, 2, 3, 5, 8)
WIDTHS = (1, 4, 16, 16, 16, 64, 300)
TIMEOUT_MS = "60000"


@dataclass(slots=True)
class Count:
    """Counts of the answers, and the first few wrong ones."""

    right: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of all requests."""
        return self.right + self.wrong + sum(self.refused.values())


def main() -> int:
    """Run, print, write mixups.json. Return 1 if an answer was another caller's or was missing."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("mixups") as running:
        running.deploy(stack.MODELS / "echo" / "model.py", "echo", replicas=chosen.workers)
        print(f"serving; {chosen.requests:,} requests by {chosen.callers} callers", flush=True)
        began = time.monotonic()
        count = asyncio.run(ask(running.gateway_port, chosen.callers, chosen.requests))
        took = time.monotonic() - began
    print(
        f"{count.total:,} requests in {took:.0f} s ({count.total / took:,.0f}/s), {len(count.sizes)} shapes"
    )
    print(f"right: {count.right:,}  mixed up: {count.wrong:,}  refused: {dict(count.refused) or 0}")
    print("\n".join(count.examples))
    met = count.wrong == 0 and count.right == chosen.requests
    print(f"{'PASS' if met else 'MISS'}  every one of {chosen.requests:,} answers is its caller's")
    document = {
        "machine": machine,
        "requests": count.total,
        "callers": chosen.callers,
        "workers": chosen.workers,
        "seconds": took,
        "right": count.right,
        "mixed_up": count.wrong,
        "refused": dict(count.refused),
        "shapes": dict(count.sizes),
    }
    report.write_json(chosen.out / "mixups.json", document)
    return 0 if met else 1


async def ask(port: int, callers: int, requests: int) -> Count:
    """Send all requests, from several concurrent callers."""
    client, count = Client(port), Count()
    shares = [requests // callers + (1 if at < requests % callers else 0) for at in range(callers)]
    try:
        await asyncio.gather(*(_caller(client, count, at, share) for at, share in enumerate(shares)))
    finally:
        client.close()
    return count


async def _caller(client: Client, count: Count, number: int, share: int) -> None:
    draw = random.Random(number)
    values = np.random.default_rng(number)
    for at in range(share):
        shape = draw.choice(ROWS), draw.choice(WIDTHS)
        x = values.standard_normal(shape, dtype=np.float32)
        # Callers never send the same input: the first value contains the caller's number.
        x[0, 0] = number + at / 4096
        count.sizes[f"{shape[0]}x{shape[1]}"] += 1
        binary = draw.random() < 0.5
        body, headers = _binary(x) if binary else _json(x)
        answer = await client.post(PATH, body, headers)
        if answer.status != 200:
            count.refused[f"HTTP {answer.status}"] += 1
            continue
        _compare(count, x, answer)


def _compare(count: Count, x: Any, answer: Answer) -> None:
    y = _read(answer)
    if y.shape == x.shape and y.tobytes() == x.tobytes():
        count.right += 1
        return
    count.wrong += 1
    if len(count.examples) < 5:
        count.examples.append(f"  sent {x.shape} {x.ravel()[:3]}, got {y.shape} {y.ravel()[:3]}")


def _json(x: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    headers = {"Content-Type": "application/json", "X-Request-Timeout-Ms": TIMEOUT_MS}
    return json.dumps({"inputs": [tensor]}).encode(), headers


def _binary(x: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        HEADER_LENGTH: str(len(head)),
        "X-Request-Timeout-Ms": TIMEOUT_MS,
    }
    return head + x.tobytes(), headers


def _read(answer: Answer) -> Any:
    length = answer.headers.get(HEADER_LENGTH.lower())
    if length is None:
        output = json.loads(answer.body)["outputs"][0]
        return np.asarray(output["data"], np.float32).reshape(output["shape"])
    output = json.loads(answer.body[: int(length)])["outputs"][0]
    return np.frombuffer(answer.body[int(length) :], np.float32).reshape(output["shape"])


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="over all callers (default: 100000)")
    parser.add_argument("--callers", type=int, default=64, help="concurrent callers (default: 64)")
    parser.add_argument("--workers", type=int, default=2, help="replicas of the model (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
