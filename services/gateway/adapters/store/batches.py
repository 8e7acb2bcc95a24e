"""Batches of jobs in the store of jobs: their records, files and leases.

tidegate:batch:r:<id>        the record (a hash); its field ``owner`` is the process that runs it
tidegate:batch:lines:<id>    chunks of the uploaded file, in order; deleted when the batch is over
tidegate:batch:results:<id>  chunks of the results, in order
tidegate:batch:open          ids of batches that are not over; the score is the end (ms) of the lease
tidegate:batch:of:<name>     ids of a principal's batches, in order of creation; an empty name: all batches
tidegate:batch:openai:<name> the same, for batches of OpenAI's API; their results are files (``files.py``)
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import orjson
from redis.asyncio import Redis

from services.gateway.adapters.store.files import chunk_key, entry_of
from services.gateway.domain.batches import Batch, BatchState, FileChunk
from services.gateway.domain.openai.facts import OpenAiFacts
from services.gateway.domain.openai.files import StoredFile
from tidegate.kernel.protocol.jobs import Level
from tidegate.kernel.store.connection import Connected, answer
from tidegate.kernel.store.jobs import REPLY
from tidegate.kernel.store.scripts import Scripts

PREFIX = "tidegate:batch:"
RECORD, LINES, RESULTS, OPEN, OF, OPENAI = (
    f"{PREFIX}r:".encode(),
    f"{PREFIX}lines:".encode(),
    f"{PREFIX}results:".encode(),
    f"{PREFIX}open".encode(),
    f"{PREFIX}of:".encode(),
    f"{PREFIX}openai:".encode(),
)


NO_CHUNKS: Mapping[bytes, FileChunk] = {}


class BatchStore(Connected):
    """Typed access to the batches. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def create(self, batch: Batch, lines: Sequence[FileChunk]) -> None:
        """Write a batch's record and the chunks of its file. After this, a process may lease the batch."""
        facts = {
            "model": batch.model,
            "version": batch.version,
            "level": batch.level,
            "ttl_s": batch.ttl_s,
            "endpoints": batch.endpoints,
            "lines": batch.lines,
            "weight": batch.weight,
            "role": batch.role,
            "openai": None if batch.openai is None else batch.openai.to_json(),
        }
        fields: dict[Any, Any] = {
            "state": batch.state,
            "principal": batch.principal,
            "created": batch.created_ms,
            "facts": orjson.dumps(facts),
        }
        pipe = self._redis.pipeline(transaction=True)
        pipe.hset(RECORD + batch.id, mapping=fields)
        pipe.rpush(LINES + batch.id, *(orjson.dumps(list(chunk)) for chunk in lines))
        for name in (b"", batch.principal.encode()):
            pipe.zadd(_index(batch.openai is not None) + name, {batch.id: 0})
        pipe.zadd(OPEN, {batch.id: 0})
        await answer(pipe.execute())

    async def get(self, id: bytes) -> Batch | None:
        """Return a batch, or None."""
        return _batch(id, await answer(self._redis.hgetall(RECORD + id)))

    async def lines(self, id: bytes) -> list[FileChunk]:
        """Return the chunks of a batch's uploaded file. They are deleted when the batch is over."""
        return await self._chunks(LINES + id)

    async def results(self, id: bytes) -> list[FileChunk]:
        """Return the chunks of the results that were written so far."""
        return await self._chunks(RESULTS + id)

    async def latest(
        self, principal: str | None, before: bytes | None, limit: int, *, openai: bool = False
    ) -> list[Batch]:
        """Return at most ``limit`` batches, newest first.

        ``principal``: the owner; None means any. ``before``: a batch's id, to return only older batches; None
        means all. ``openai``: True for batches of OpenAI's API, False for Tidegate's batches.
        """
        index = _index(openai) + (principal or "").encode()
        batches: list[Batch] = []
        while len(batches) < limit:
            start = b"(" + before if before is not None else b"+"
            ids = await answer(self._redis.zrevrangebylex(index, start, b"-", 0, limit - len(batches)))
            for id_ in ids:
                batch = await self.get(id_)
                if batch is not None:
                    batches.append(batch)
                else:  # the record has expired
                    await answer(self._redis.zrem(index, id_))
            if not ids:
                break
            before = ids[-1]
        return batches

    async def claim(self, owner: str, lease_ms: int) -> bytes | None:
        """Take the lease of a batch that no process runs, and return the batch's id.

        Return None if there is no such batch.

        ``owner``: the process that takes the lease, for ``lease_ms`` milliseconds.
        """
        id_: bytes | None = await self._scripts.run("batch_claim", [owner, lease_ms])
        return id_

    async def step(
        self,
        id: bytes,
        owner: str,
        lease_ms: int,
        *,
        done: int,
        written: int,
        counts: Mapping[str, int],
        size: int,
        chunk: FileChunk | None = None,
        file_chunks: Mapping[bytes, FileChunk] = NO_CHUNKS,
        files: Sequence[StoredFile] = (),
        end: BatchState | None = None,
        error: str = "",
        keep_s: int = 0,
    ) -> BatchState | None:
        """Write a batch's progress and renew its lease for ``lease_ms``.

        ``chunk``: the next chunk of the results. ``file_chunks``: for an OpenAI batch, the next chunk of each
        file that the batch writes, under the file's id.

        ``end``: the state in which the batch ends; None if the batch continues. At the end, ``files`` are
        added to the caller's files, and the batch is kept for ``keep_s`` seconds.

        Return the batch's state, or None if another process has the lease or the batch has ended.
        """
        pairs = [[chunk_key(id_), orjson.dumps(list(each)).decode()] for id_, each in file_chunks.items()]
        new_chunk = orjson.dumps(list(chunk)) if chunk is not None else b""
        state: bytes | None = await self._scripts.run(
            "batch_step",
            [
                id,
                owner,
                lease_ms,
                done,
                new_chunk,
                written,
                orjson.dumps(dict(counts)),
                size,
                end or "",
                error,
                keep_s,
                orjson.dumps(pairs),
                orjson.dumps([entry_of(file) for file in files]),
            ],
        )
        return cast(BatchState, state.decode()) if state is not None else None

    async def validated(self, id: bytes, model: str) -> None:
        """Record that the file of a batch was checked.

        ``model``: the model that all lines name; empty if the lines name different models.
        """
        now_ms = int(time.time() * 1e3)
        await answer(self._redis.hset(RECORD + id, mapping={"validated": now_ms, "model": model}))

    async def reading(self, file: bytes) -> bytes | None:
        """Return the id of an unfinished batch with the input file ``file``; None if there is none."""
        for id_ in await answer(self._redis.zrange(OPEN, 0, -1)):
            batch = await self.get(id_)
            if batch is not None and batch.openai is not None and batch.openai.input_file == file:
                return batch.id
        return None

    async def replies(self, jobs: Sequence[bytes]) -> list[bytes | None]:
        """Return the reply frame of each job, in order; None for a job without a reply."""
        keys = [REPLY.encode() + id_ for id_ in jobs]
        frames: list[bytes | None] = await answer(self._redis.mget(keys)) if keys else []
        return frames

    async def cancel(self, id: bytes) -> Batch | None:
        """Mark a batch as cancelling, if it is running. Return the batch, or None if it does not exist."""
        return _batch(id, await self._scripts.run("batch_cancel", [id]))

    async def _chunks(self, key: bytes) -> list[FileChunk]:
        return [FileChunk(*orjson.loads(line)) for line in await answer(self._redis.lrange(key, 0, -1))]


def _index(openai: bool) -> bytes:
    return OPENAI if openai else OF


def _batch(id: bytes, record: Mapping[bytes, bytes] | Sequence[bytes]) -> Batch | None:
    if not record:
        return None
    fields = record if isinstance(record, Mapping) else dict(zip(record[::2], record[1::2], strict=True))
    facts: dict[str, Any] = orjson.loads(fields[b"facts"])
    endpoints = facts["endpoints"]
    return Batch(
        id=id,
        state=cast(BatchState, fields[b"state"].decode()),
        principal=fields[b"principal"].decode(),
        lines=facts["lines"],
        created_ms=int(fields[b"created"]),
        model=fields[b"model"].decode() if b"model" in fields else facts["model"],
        version=facts["version"],
        level=cast(Level, facts["level"]),
        ttl_s=facts["ttl_s"],
        endpoints=None if endpoints is None else tuple(endpoints),
        finished_ms=int(fields.get(b"finished", 0)),
        written=int(fields.get(b"written", 0)),
        counts=orjson.loads(fields.get(b"counts", b"{}")),
        done=int(fields.get(b"done", 0)),
        error=fields.get(b"error", b"").decode(),
        size=int(fields.get(b"size", 0)),
        openai=OpenAiFacts.from_json(facts["openai"]) if facts.get("openai") else None,
        validated_ms=int(fields.get(b"validated", 0)),
        cancelling_ms=int(fields.get(b"cancelling", 0)),
        # An older release has not stored these.
        weight=facts.get("weight", 1),
        role=facts.get("role", ""),
    )
