"""A batch runner with fakes of the store, the jobs, and its caller's quota."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from services.gateway.application.access import Grant
from services.gateway.application.jobs import batch_runner
from services.gateway.application.jobs.batch_runner import BatchRunner
from services.gateway.domain.batches import Batch, FileChunk
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import TooMany
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.usage import COUNTS

pytestmark = pytest.mark.unit


class Store:
    """A store that keeps the progress it gets."""

    def __init__(self, lines: list[FileChunk]) -> None:
        self._lines = lines
        self.chunks: list[FileChunk] = []
        self.done = self.written = 0
        self.state = "running"

    async def lines(self, _: bytes) -> list[FileChunk]:
        return self._lines

    async def replies(self, ids: list[bytes]) -> list[bytes | None]:
        return [b"frame"] * len(ids)

    async def step(self, _id: bytes, _owner: str, _lease_ms: int, **told: Any) -> str:
        self.done, self.written = told["done"], told["written"]
        self.chunks += [told["chunk"]] if told.get("chunk") else []
        self.state = told.get("end") or self.state
        return self.state


class FakeJobs:
    """Jobs that succeed as soon as they are accepted."""

    def __init__(self) -> None:
        self.store = self
        self.taken: list[int] = []

    def check(self, *_: Any, **given: Any) -> int:
        return int(given["line"])

    async def submit(self, line: int) -> Any:
        self.taken.append(line)
        return SimpleNamespace(job=SimpleNamespace(id=line.to_bytes(16, "big")), fresh=True)

    async def get_many(self, ids: list[bytes]) -> list[Any]:
        return [SimpleNamespace(id=id_, terminal=True, state="succeeded", result_size=1) for id_ in ids]

    async def cancel_all(self, ids: list[bytes]) -> None:
        """No-op: all jobs have ended."""


class FakeAccess:
    """Admits ``left`` requests, and counts as the real one does."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.counts = [0] * len(COUNTS)

    def recheck(self, principal: Principal) -> Principal:
        return principal

    def admit(self, principal: Principal, endpoint: str) -> Grant:
        if self.left <= 0:
            raise TooMany("the quota is used up", reason="quota_exhausted", retry_after_s=0.05)
        self.left -= 1
        return Grant(lambda *_: self.counts, principal, endpoint, None)


class FakeResults:
    async def encoded(self, *_: Any, **__: Any) -> tuple[bytes, list[bytes]]:
        return b"{}", []


@pytest.fixture
def blobs(tmp_path):
    found = Blobs(f"file://{tmp_path}")
    yield found
    found.close()


async def test_results_are_written_while_lines_wait_for_their_callers_quota(blobs, until, monkeypatch):
    monkeypatch.setattr(batch_runner, "SAVE_S", 0.02)
    monkeypatch.setattr(batch_runner, "RENEW_S", 0.02)
    content = b"".join(orjson.dumps({"inputs": []}) + b"\n" for _ in range(9))
    store, jobs, access = (
        Store([FileChunk(await blobs.put(content, 60), 9, len(content))]),
        FakeJobs(),
        FakeAccess(5),
    )
    facts: dict[str, Any] = {"principal": "p", "lines": 9, "created_ms": 0, "model": "m"}
    batch = Batch(id=bytes(16), state="running", **facts)
    make: Any = BatchRunner
    run = asyncio.create_task(make(batch, "me", store, jobs, jobs, FakeResults(), blobs, access, 60).run())
    await until(lambda: store.written == 5)
    assert (store.done, store.state, run.done()) == (5, "running", False)
    access.left = 4
    await asyncio.wait_for(run, 20)
    assert (store.written, store.state) == (9, "completed")
    rows = [orjson.loads(row) for chunk in store.chunks for row in (await blobs.get(chunk.key)).splitlines()]
    assert [row["line"] for row in rows] == list(range(9)) == sorted(jobs.taken)
    used = dict(zip(COUNTS, access.counts, strict=True))
    assert used["received_bytes"] == len(content) - 9
    assert used["requests"] == 0, "each line is a job, which counts at its end"
