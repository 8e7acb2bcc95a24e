"""Files of OpenAI's API in the store of jobs: their records, and the chunks of their bytes.

tidegate:file:r:<hex id>         the record, JSON; it expires with the file
tidegate:file:chunks:<hex id>    chunks of the file in the blob store, in order
tidegate:file:of:<name>          hex ids of a principal's files, in order of creation; no name: all files
tidegate:file:uploads            hex ids of uploads that have not ended; the score is their last progress (ms)
"""

from __future__ import annotations

import time
from typing import Any

import orjson

from services.gateway.domain.batches import FileChunk
from services.gateway.domain.openai.files import StoredFile
from tidegate.kernel.store.connection import Connected, answer

PREFIX = "tidegate:file:"
RECORD, CHUNKS, OF, UPLOADS = f"{PREFIX}r:", f"{PREFIX}chunks:", f"{PREFIX}of:", f"{PREFIX}uploads"
AT_A_TIME = 100


class FileStore(Connected):
    """Typed access to the files. Every failure raises ``StoreUnavailable``."""

    async def add_chunk(self, id_: bytes, chunk: FileChunk, keep_s: float) -> None:
        """Add a chunk to an upload, and record the time of this progress.

        :meth:`abandoned` uses this time to find stalled uploads.
        """
        pipe = self._redis.pipeline(transaction=True)
        pipe.zadd(UPLOADS, {id_.hex(): int(time.time() * 1e3)})
        pipe.rpush(chunk_key(id_), orjson.dumps(list(chunk)))
        pipe.expire(chunk_key(id_), int(keep_s))
        await answer(pipe.execute())

    async def end_upload(self, file: StoredFile) -> bool:
        """End an upload and write the file's record.

        If :meth:`abandoned` has given up the upload, delete the file again and return False.
        """
        entry = entry_of(file)
        pipe = self._redis.pipeline(transaction=True)
        pipe.zrem(UPLOADS, entry["member"])
        pipe.expire(entry["chunks"], entry["keep_s"])
        pipe.set(entry["record"], entry["value"], ex=entry["keep_s"])
        for index in entry["indexes"]:
            pipe.zadd(index, {entry["member"]: 0})
        was_open, *_ = await answer(pipe.execute())
        if not was_open:
            await self.delete(file)
        return bool(was_open)

    async def abandoned(self, idle_s: float) -> list[bytes]:
        """Give up uploads that had no progress for ``idle_s`` seconds, and return their ids.

        One call gives up at most ``AT_A_TIME`` uploads.
        """
        before = int((time.time() - idle_s) * 1e3)
        ids = await answer(self._redis.zrangebyscore(UPLOADS, "-inf", before, 0, AT_A_TIME))
        return [bytes.fromhex(id_.decode()) for id_ in ids if await answer(self._redis.zrem(UPLOADS, id_))]

    async def drop_upload(self, id_: bytes) -> list[FileChunk]:
        """Delete the list of an upload's chunks, and return the chunks."""
        chunks = await self.chunks(id_)
        pipe = self._redis.pipeline(transaction=True)
        pipe.zrem(UPLOADS, id_.hex())
        pipe.delete(chunk_key(id_))
        await answer(pipe.execute())
        return chunks

    async def get(self, id_: bytes) -> StoredFile | None:
        """Return a file, or None."""
        return _file(await answer(self._redis.get(RECORD + id_.hex())))

    async def chunks(self, id_: bytes) -> list[FileChunk]:
        """Return the chunks of a file."""
        raw = await answer(self._redis.lrange(CHUNKS + id_.hex(), 0, -1))
        return [FileChunk(*orjson.loads(line)) for line in raw]

    async def latest(
        self,
        principal: str | None,
        after: bytes | None,
        limit: int,
        *,
        purpose: str | None = None,
        oldest_first: bool = False,
    ) -> list[StoredFile]:
        """Return at most ``limit`` files, newest first unless ``oldest_first``.

        ``principal``: the owner; None means any. ``after``: the last id of the previous page; None for the
        first page. ``purpose``: return only files with this purpose; None means any.
        """
        index, found = OF + (principal or ""), list[StoredFile]()
        while len(found) < limit:
            edge = b"(" + after.hex().encode() if after is not None else None
            count = min(AT_A_TIME, limit - len(found))
            if oldest_first:
                ids = await answer(self._redis.zrangebylex(index, edge or b"-", b"+", 0, count))
            else:
                ids = await answer(self._redis.zrevrangebylex(index, edge or b"+", b"-", 0, count))
            if not ids:
                break
            records = await answer(self._redis.mget([RECORD.encode() + id_ for id_ in ids]))
            expired = [id_ for id_, record in zip(ids, records, strict=True) if record is None]
            if expired:
                await answer(self._redis.zrem(index, *expired))
            files = [file for record in records if (file := _file(record)) is not None]
            found += [file for file in files if purpose in (None, file.purpose)]
            after = bytes.fromhex(ids[-1].decode())
        return found

    async def delete(self, file: StoredFile) -> bool:
        """Delete a file's record and its list of chunks. Return False if it was deleted before."""
        entry = entry_of(file)
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(entry["record"])
        pipe.delete(entry["chunks"])
        for index in entry["indexes"]:
            pipe.zrem(index, entry["member"])
        deleted, *_ = await answer(pipe.execute())
        return bool(deleted)


def chunk_key(id_: bytes) -> str:
    """Return the key under which the store has the list of a file's chunks."""
    return CHUNKS + id_.hex()


def entry_of(file: StoredFile) -> dict[str, Any]:
    """Return the keys and values that the store needs for a file. A Lua script can write them."""
    fields = {
        "principal": file.principal,
        "filename": file.filename,
        "purpose": file.purpose,
        "size": file.size,
        "lines": file.lines,
        "created_ms": file.created_ms,
        "expires_ms": file.expires_ms,
    }
    return {
        "record": RECORD + file.id.hex(),
        "value": orjson.dumps(fields | {"id": file.id.hex()}).decode(),
        "chunks": chunk_key(file.id),
        "indexes": [OF, OF + file.principal],
        "member": file.id.hex(),
        "keep_s": max(1, int(file.expires_ms / 1e3 - time.time())),
    }


def _file(record: bytes | None) -> StoredFile | None:
    if record is None:
        return None
    fields = orjson.loads(record)
    return StoredFile(**fields | {"id": bytes.fromhex(fields["id"])})
