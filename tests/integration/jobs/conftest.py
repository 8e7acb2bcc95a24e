"""A job store on a real Valkey, empty, and jobs to put into it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable

import pytest

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import Finish, Job, NewJob, Take, Taken, new_id
from tidegate.kernel.store import JobStore


@pytest.fixture
async def store(jobs_url, redis) -> AsyncIterator[JobStore]:
    found = JobStore.connect(jobs_url)
    yield found
    await found.close()


@pytest.fixture
async def other(jobs_url) -> AsyncIterator[JobStore]:
    """The store as another process sees it."""
    found = JobStore.connect(jobs_url)
    yield found
    await found.close()


def new_job(age_ms: int = 0, **given) -> NewJob:
    """A job that can be accepted."""
    now = int(time.time() * 1e3)
    id_ = new_id(now - age_ms, os.urandom(10))
    facts = {
        "model": "digits",
        "endpoint": "digits",
        "deployment": "digits-v1",
        "version": 1,
        "principal": "anonymous",
        "created_ms": now - age_ms,
        "expires_ms": now + 3_600_000,
        **given,
    }
    flags = envelope.RETRY_SAFE if facts.get("retry_safe", True) else 0
    frame = envelope.request_frame(id_, facts["expires_ms"], 1, b"key", [b"data"], flags=flags)
    return NewJob(id=id_, frame=frame, **facts)


class Way:
    """Takes jobs along their way."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def queued(self, **given) -> Job:
        new = new_job(**given)
        await self._store.accept(new)
        await self._store.queued([new.id])
        return await self.job(new.id)

    async def take(self, id: bytes, worker: str = "w1", **given) -> Taken:
        wish = Take(id, worker, False, 0, token=os.urandom(8))._replace(**given)
        (found,) = await self._store.take([wish])
        return found

    async def running(self, worker: str = "w1", **given) -> Job:
        job = await self.queued(**given)
        assert (await self.take(job.id, worker)).outcome == "run"
        return await self.job(job.id)

    async def finished(self, state="succeeded", **given) -> Job:
        job = await self.running(**given)
        assert await self.finish(job.id, 1, state)
        return await self.job(job.id)

    async def finish(self, id: bytes, attempt: int, state="succeeded", **given) -> bool:
        (ours,) = await self._store.finish([Finish(id, attempt, state, **given)])
        return ours

    async def job(self, id: bytes) -> Job:
        found = await self._store.get(id)
        assert found is not None
        return found


@pytest.fixture
def way(store) -> Way:
    return Way(store)


@pytest.fixture
def new() -> Callable[..., NewJob]:
    return new_job
