"""``python -m benchmarks.catalogue``: measure lists, searches and comparisons with 10,000 versions.

It fills a database, starts a real registry process on it, and calls that process over HTTP. It measures
SQLite, and PostgreSQL if its package is installed or ``--database-url`` names an empty database. Lists,
searches and comparisons must take 300 ms at most.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks import options, report, session

LIMIT_MS = 300.0
BIG_MODEL = "big"
START_LIMIT_S = 60.0
TOKEN = "catalogue-benchmark"

Call = Callable[[], Awaitable[None]]


def main() -> int:
    """Measure each database, print the tables and return 1 if a limit is exceeded."""
    arguments = _arguments()
    with session.session():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    missed = 0
    results: dict[str, Any] = {}
    for kind in ("sqlite", "postgresql"):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-catalogue-")))
            url = _database(kind, folder, arguments.database_url, stack)
            if url is None:
                continue
            rows = asyncio.run(_measured(url, folder, arguments))
        results[kind] = rows
        print(f"\n{kind}, {arguments.versions:,} versions, {arguments.rounds} rounds\n\n{_table(rows)}\n")
        for row in rows:
            if row["limit"] and row["worst_ms"] > LIMIT_MS:
                missed += 1
                print(f"MISS: {row['what']} took {row['worst_ms']:.0f} ms, at most {LIMIT_MS:g} ms")
    report.write_json(arguments.out / "catalogue.json", {"machine": report.machine(), "results": results})
    print("MISS" if missed else f"PASS: every list, search and comparison took at most {LIMIT_MS:g} ms")
    return 1 if missed else 0


def _database(kind: str, folder: Path, given: str | None, stack: ExitStack) -> str | None:
    """Return the URL of an empty database; None if there is no server for it."""
    from tests.integration.registry import postgres

    if kind == "sqlite":
        return f"sqlite+aiosqlite:///{folder}/registry.db"
    if given:
        return given
    try:
        return stack.enter_context(postgres.running()).url("postgres")
    except postgres.NoPostgres as reason:
        print(f"PostgreSQL is not measured: {reason}")
        return None


async def _measured(url: str, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from services.registry.adapters.sql import migrate

    began = time.monotonic()
    await migrate.migrate(url)
    await _fill(url, arguments.versions)
    print(f"filled {arguments.versions:,} versions in {time.monotonic() - began:.1f} s")
    with _registry(url, folder) as address:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=address, headers=headers, trust_env=False, timeout=60) as http:
            await _ready(http)
            return [
                await _row(what, call, arguments.rounds, limit=limit)
                for what, limit, call in _calls(http, arguments.versions)
            ]


async def _fill(url: str, count: int) -> None:
    """Write half of the versions to one model, and the rest to models of 50 versions."""
    from services.registry.adapters.sql.database import RegistryDatabase
    from tidegate.kernel.protocol.models import Signature, TensorSpec, Version

    database, chance = RegistryDatabase(url), random.Random(7)
    tensor = TensorSpec(name="x", datatype="FP32", shape=[64])
    signature = Signature(inputs=[tensor], outputs=[tensor], max_batch_size=64)
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    for start in range(0, count, 1_000):
        async with database.write() as writer:
            for each in range(start, min(start + 1_000, count)):
                model = BIG_MODEL if each < count // 2 else f"model-{(each - count // 2) // 50:03d}"
                digest = f"{each:064x}"
                await writer.note_artifact(digest, 1_000 + each, begun)
                version = Version(
                    model=model,
                    number=await writer.next_number(model),
                    format="onnx",
                    artifact_sha256=digest,
                    artifact_size=1_000 + each,
                    filename="model.onnx",
                    signature=signature,
                    metadata=_metadata(chance, each, begun),
                    created_at=begun + timedelta(minutes=each),
                )
                await writer.add_version(version)
    await database.close()


def _metadata(chance: random.Random, each: int, begun: datetime) -> Any:
    from tidegate.kernel.protocol.models import VersionMetadata

    return VersionMetadata(
        trained_at=begun + timedelta(minutes=each),
        metrics={"accuracy": chance.random(), "loss": chance.random(), "f1": chance.random()},
        parameters={"depth": chance.randrange(9), "lr": chance.random(), "booster": "dart"},
        tags={"team": chance.choice(("vision", "fraud", "search")), "stage": "test"},
        owner=chance.choice(("ann", "bob", "eve")),
        framework="xgboost",
        dependencies=["xgboost==2.1.0", "numpy==1.26.4"],
        commit=f"{each:040x}",
    )


def _calls(http: httpx.AsyncClient, count: int) -> Iterator[tuple[str, bool, Call]]:
    """Yield the calls: a title, whether the limit holds for it, and the call."""

    def get(path: str, **query: Any) -> Call:
        async def call() -> None:
            answer = await http.get(path, params=query)
            answer.raise_for_status()
            assert answer.json()

        return call

    big, last = f"/v1/models/{BIG_MODEL}/versions", count // 2
    yield "list the models", True, get("/v1/models")
    yield "list the models, a page of 100", True, get("/v1/models", limit=100)
    yield "list the versions of a model, without a limit", True, get(big)
    yield "list the versions of a model, a page of 100", True, get(big, limit=100)
    yield "list the versions of a model, newest 100", True, get(big, limit=100, order_by="created desc")
    for title, query in (
        ("a metric", {"filter": "metrics.accuracy > 0.9"}),
        ("a metric, a tag and a date", {
            "filter": "metrics.accuracy > 0.5 and tags.team = 'fraud' and created > 2026-01-02",
            "order_by": "metrics.accuracy desc",
        }),
        ("a part of the name", {"filter": "name like '%-07%' and owner = ann"}),
        ("what no version has", {"filter": "metrics.accuracy > 2"}),
        ("what all have, 1,000 of them", {"filter": "tags.stage = test", "limit": 1000}),
    ):  # fmt: skip
        yield f"search: {title}", True, get("/v1/versions", **{"limit": 100, **query})
    yield "compare two versions", True, get("/v1/compare", a=f"{BIG_MODEL}@1", b=f"{BIG_MODEL}@{last}")
    yield "compare two models", True, get("/v1/compare", a=BIG_MODEL, b="model-000")
    yield "read the desired state", False, get("/v1/desired-state")
    yield "deploy another version", False, _deploys(http)
    yield "register a version", False, _registers(http)


def _deploys(http: httpx.AsyncClient) -> Call:
    versions = iter(range(1, 10_000))

    async def call() -> None:
        answer = await http.post("/v1/deploy", json={"model": BIG_MODEL, "version": next(versions)})
        answer.raise_for_status()

    return call


def _registers(http: httpx.AsyncClient) -> Call:
    numbers = iter(range(1_000_000))

    async def call() -> None:
        source = f"def predict(x: float) -> float:\n    return x + {next(numbers)}\n".encode()
        uploaded = (await http.put("/v1/artifacts", content=source)).raise_for_status().json()
        body = {"artifact": uploaded["sha256"], "filename": "model.py", "breaking": True}
        (await http.post(f"/v1/models/{BIG_MODEL}/versions", json=body)).raise_for_status()

    return call


async def _row(what: str, call: Call, rounds: int, *, limit: bool) -> dict[str, Any]:
    await call()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        await call()
        times.append((time.perf_counter() - began) * 1e3)
    return {"what": what, "limit": limit, "median_ms": median(times), "worst_ms": max(times)}


@contextmanager
def _registry(url: str, folder: Path) -> Iterator[str]:
    """Run a registry process on the database, and return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "TIDEGATE_STATE_DIR": str(folder),
        "TIDEGATE_SERVICE_TOKEN": TOKEN,
        "TIDEGATE_DATABASE_URL": url,
        "TIDEGATE_REGISTRY_PORT": str(port),
        "TIDEGATE_AMQP_URL": "amqp://guest:guest@127.0.0.1:9/",  # nothing listens there
    }
    with (folder / "registry.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.registry"], env=environment, stdout=log, stderr=log
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def _ready(http: httpx.AsyncClient) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        try:
            if (await http.get("/health/live")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(0.1)
    raise TimeoutError("The registry did not start.")


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[row["what"], f"{row['median_ms']:.1f}", f"{row['worst_ms']:.1f}"] for row in rows]
    return report.table(["call", "median ms", "worst ms"], lines)


def _arguments() -> argparse.Namespace:
    parser = options.parser(__doc__)
    parser.add_argument("--versions", type=int, default=10_000, help="versions to store (default: 10,000)")
    parser.add_argument("--rounds", type=int, default=30, help="of each call (default: 30)")
    parser.add_argument("--database-url", help="an empty PostgreSQL database; default: a new server")
    return parser.parse_args()


if __name__ == "__main__":
    session.run(main)
