"""Count the answers of weighted and sticky targets on a real stack: ``python -m benchmarks.weights``.

One endpoint shares its traffic 90 : 9 : 1 among three versions. Two gateway processes share a port. In every
100 requests of each process, the counts must be exactly 90, 9 and 1. Then requests with sticky keys are
repeated while the weights of another endpoint change. No key may move.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import options, report, session, stack
from benchmarks.client import Client
from benchmarks.errors import BenchmarkFailed

MODEL = stack.EXAMPLES / "identity" / "model.py"
WEIGHTS = {"1": 90, "2": 9, "3": 1}
BLOCK = 100
CONNECTIONS = 8
SETTLE_S = 3.0
STICKY = "X-User"
BODY = json.dumps(
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16], "data": [1.0] * 16}]}
).encode()


@dataclass(slots=True)
class Shares:
    """The answers by version, the blocks of 100 requests with other counts, and failed requests."""

    counts: Counter[str]
    blocks: int = 0
    inexact: int = 0
    failed: int = 0

    @property
    def largest_error(self) -> float:
        """Return the largest difference to a version's weight, in percentage points."""
        total = max(1, self.counts.total())
        return max(abs(100 * self.counts[version] / total - weight) for version, weight in WEIGHTS.items())


def version_of(body: bytes) -> str:
    """Return the version that answered."""
    return str(json.loads(body)["model_version"])


async def clients_of(port: int, gateway: psutil.Process, count: int) -> list[list[Client]]:
    """Return ``count`` clients of each gateway process. The kernel decides which process has a connection."""
    found: dict[int, list[Client]] = {member.pid: [] for member in gateway.children()}
    for _ in range(100 * len(found)):
        if all(len(each) >= count for each in found.values()):
            return [each[:count] for each in found.values()]
        client = Client(port)
        await client.get("/health/live")
        (local,) = client.local_ports()
        found[_owner(gateway.children(), local)].append(client)
    raise BenchmarkFailed(f"Some gateway processes got no connections: {found.keys()}")


def _owner(members: Iterable[psutil.Process], port: int) -> int:
    for member in members:
        if any(each.raddr and each.raddr.port == port for each in member.net_connections("tcp")):
            return member.pid
    raise BenchmarkFailed(f"No gateway process has the connection from port {port}.")


async def blocks(clients: list[Client], path: str, count: int, shares: Shares) -> None:
    """Send blocks of 100 requests to one process, each block after the one before was answered."""
    for _ in range(count):
        seen: Counter[str] = Counter()
        numbers = iter(range(BLOCK))

        async def caller(client: Client, numbers: Iterable[int], seen: Counter[str]) -> None:
            for _ in numbers:
                answer = await client.post(path, BODY, {})
                if answer.status != 200:
                    shares.failed += 1
                else:
                    seen[version_of(answer.body)] += 1

        await asyncio.gather(*(caller(client, numbers, seen) for client in clients))
        shares.blocks += 1
        shares.inexact += seen != WEIGHTS
        shares.counts += seen


@dataclass(slots=True)
class Stays:
    """The requests with sticky keys, the changes of other weights meanwhile, and the keys that moved."""

    keys: int
    requests: int = 0
    changes: int = 0
    moved: int = 0
    failed: int = 0
    targets: int = 0


async def sticky(running: stack.Stack, clients: list[Client], name: str, other: str, chosen: Any) -> Stays:
    """Repeat requests with sticky keys while the weights of another endpoint change."""
    found = Stays(chosen.keys)
    first: dict[int, str] = {}
    path = f"/v2/models/{name}/infer"
    changing = asyncio.create_task(_change(running, other, chosen.changes, found))
    for turn in itertools.count():
        if turn and changing.done():
            break
        for key in range(chosen.keys):
            client = clients[(key + turn) % len(clients)]  # so that every process has each key
            answer = await client.post(path, BODY, {STICKY: str(key)})
            found.requests += 1
            if answer.status != 200:
                found.failed += 1
                continue
            version = version_of(answer.body)
            found.moved += first.setdefault(key, version) != version
    await changing
    found.targets = len(set(first.values()))
    return found


async def _change(running: stack.Stack, other: str, changes: int, found: Stays) -> None:
    for turn in range(changes):
        weights = ("v1=50", "v2=50") if turn % 2 else ("v1=10", "v2=90")
        await asyncio.to_thread(running.command, "split", other, *weights)
        found.changes += 1


def deploy(running: stack.Stack, name: str, versions: int) -> None:
    """Serve several versions of the identity model; the first one has all traffic."""
    signature = str(MODEL.with_name("signature.json"))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, versions + 1):
            path = Path(folder) / "model.py"
            path.write_text(f"{MODEL.read_text()}# {name} {number}\n")
            without = ["--no-traffic"] if number > 1 else []
            running.command(
                *("deploy", str(path), "--name", name, "--signature", signature, "--min", "1", "--max", "1"),
                *without,
            )


def gateway_of(running: stack.Stack) -> psutil.Process:
    """Return the gateway's parent process."""
    record = json.loads((running.state / "run" / "stack.json").read_text())
    (found,) = [each for each in record["children"] if each["name"] == "gateway"]
    return psutil.Process(found["process"]["pid"])


async def measure(running: stack.Stack, chosen: argparse.Namespace) -> tuple[Shares, Stays]:
    """Count the answers of all processes, then those of sticky keys."""
    clients = await clients_of(running.gateway_port, gateway_of(running), CONNECTIONS)
    await asyncio.to_thread(running.command, "split", "shares", *(f"v{v}={w}" for v, w in WEIGHTS.items()))
    await asyncio.sleep(SETTLE_S)  # so that the first request already has the new weights
    clients = await clients_of(running.gateway_port, gateway_of(running), CONNECTIONS)
    shares = Shares(Counter())
    each = chosen.requests // BLOCK // len(clients)
    path = "/v2/models/shares/infer"
    await asyncio.gather(*(blocks(own, path, each, shares) for own in clients))
    await asyncio.to_thread(running.command, "traffic", "shares", "--sticky", f"header:{STICKY}")
    await asyncio.sleep(SETTLE_S)
    callers = [client for own in clients for client in own[:2]]
    return shares, await sticky(running, callers, "shares", "other", chosen)


def main() -> int:
    """Run, print, write weights.json. Return 1 if a count is wrong."""
    chosen = _arguments()
    machine = report.machine()
    with session.session(), stack.tidegate("weights", {"TIDEGATE_GATEWAY_WORKERS": "2"}) as running:
        deploy(running, "shares", 3)
        deploy(running, "other", 2)
        shares, stays = asyncio.run(measure(running, chosen))
    exact = not shares.inexact and not shares.failed and shares.largest_error <= 0.1
    total = shares.counts.total()
    parts = ", ".join(f"v{version} {shares.counts[version] / max(1, total):.3%}" for version in WEIGHTS)
    print(
        f"{'PASS' if exact else 'MISS'}  {total:,} answers through 2 gateway processes: {parts}; "
        f"{shares.inexact} of {shares.blocks} blocks of 100 differ from 90, 9, 1; {shares.failed} failed"
    )
    stay = not stays.moved and not stays.failed and stays.targets > 1
    print(
        f"{'PASS' if stay else 'MISS'}  {stays.keys:,} sticky keys at {stays.targets} versions, "
        f"{stays.requests:,} requests, {stays.changes} changes of another endpoint's weights: "
        f"{stays.moved} answers of another version; {stays.failed} failed"
    )
    print(report.machine_line(machine))
    chosen.out.mkdir(parents=True, exist_ok=True)
    counted = {"counts": dict(shares.counts), "blocks": shares.blocks, "inexact": shares.inexact}
    document = {"machine": machine, "shares": counted | {"failed": shares.failed}, "sticky": asdict(stays)}
    report.write_json(chosen.out / "weights.json", document)
    return 0 if exact and stay else 1


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--requests", type=int, default=100_000, help="of the weights (default: 100000)")
    parser.add_argument("--keys", type=int, default=1000, help="sticky keys (default: 1000)")
    parser.add_argument("--changes", type=int, default=20, help="of the other endpoint (default: 20)")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
