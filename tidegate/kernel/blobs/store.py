"""Store payloads that are too large for a message.

A payload is written once, read by its key, and deleted when it expires.

A key is ``<expiry>/<random id>``. ``expiry`` is the Unix time in seconds at which the blob expires, rounded
up to a full minute. So all blobs that expire in the same minute are in one folder. ``expiry`` is padded with
zeros, so that names sort by time.

A blob is not deleted when it is read, because a request may be retried. The gateway deletes the blobs of an
answered request. The router calls :meth:`Blobs.sweep`, which deletes all expired blobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.envelope import Buffer

BUCKET_S = 60
THREADS = 4
_KEY = re.compile(r"\d{10}/[0-9a-f]{32}")
_BUCKET = re.compile(r"\d{10}")

T = TypeVar("T")


class Blobs:
    """The blob store at a URL of :mod:`~tidegate.kernel.blobs.object_store`.

    If the URL names a folder, the blobs are read and written with plain file operations. Every failure raises
    :class:`Unavailable`.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = _Local(_local_path(url)) if _is_local(url) else _Remote(url)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")

    async def put(self, data: Buffer | Sequence[Buffer], ttl_s: float, *, durable: bool = False) -> str:
        """Store ``data`` for at least ``ttl_s`` seconds, as one blob. Return the blob's key.

        ``data`` is one buffer, or several in order. With ``durable``, the blob is on disk when this returns,
        and survives a loss of power.
        """
        key = new_key(time.time() + ttl_s)
        buffers = [data] if isinstance(data, (bytes, memoryview)) else list(data)
        await self._do("written", partial(self._place.write, key, buffers, durable))
        return key

    async def get(self, key: str) -> bytes:
        """Return a whole blob."""
        return await self._do("read", partial(self._place.read, _checked(key)))

    async def get_parts(self, key: str, sizes: Sequence[int]) -> list[Buffer]:
        """Return a blob as the buffers that were written.

        Some stores return slices of one large buffer, which avoids a copy. Then the memory is freed only when
        no slice is used any more.
        """
        return await self._do("read", partial(self._place.read_parts, _checked(key), sizes))

    async def delete(self, key: str) -> None:
        """Delete a blob if it exists."""
        with contextlib.suppress(Unavailable):  # the sweep deletes it later
            await self._do("written", partial(self._place.delete, _checked(key)))

    async def sweep(self, now: float) -> int:
        """Delete folders whose blobs expired before ``now`` (Unix time). Return the number of folders."""
        return await self._do("swept", partial(self._place.sweep, now))

    def close(self) -> None:
        """End the threads after all work that was given to them. Do not wait for this."""
        self._threads.shutdown(wait=False)

    async def _do(self, what: str, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except FileNotFoundError:
            raise Unavailable(
                "a large payload is not in the blob store any more: it has expired, or gateway and worker "
                "use different stores"
            ) from None
        except Unavailable:
            raise
        except Exception as error:  # each driver raises its own errors
            reason = str(error) or type(error).__name__
            raise Unavailable(f"the blob store cannot be {what}: {reason}", retry_after_s=5.0) from error


def new_key(expires_at: float) -> str:
    """Return a new key for a blob that can be deleted after ``expires_at``, a Unix time in seconds."""
    bucket = math.ceil(expires_at / BUCKET_S) * BUCKET_S
    return f"{bucket:010d}/{os.urandom(16).hex()}"


def _checked(key: str) -> str:
    # A key comes from a message. Check it, so that it cannot name a file outside the blob store.
    if _KEY.fullmatch(key) is None:
        raise Unavailable(f"{key[:80]!r} is not the key of a blob")
    return key


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme in object_store.LOCAL


def _local_path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path)) if "://" in url else Path(url)


class _Place(Protocol):
    """The interface to the folder or store with the blobs. Every method blocks."""

    def write(self, key: str, buffers: Sequence[Buffer], durable: bool) -> None: ...

    def read(self, key: str) -> bytes: ...

    def read_parts(self, key: str, sizes: Sequence[int]) -> list[Buffer]: ...

    def delete(self, key: str) -> None: ...

    def sweep(self, now: float) -> int: ...


class _Local(_Place):
    """A blob store in a folder. A blob has a temporary name until it is complete."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def write(self, key: str, buffers: Sequence[Buffer], durable: bool) -> None:
        path = self._root / key
        part = path.with_suffix(".part")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._hand_over(path.parent)
        try:
            with part.open("xb", buffering=0) as file:
                self._hand_over(file.fileno())
                for buffer in buffers:
                    view = memoryview(buffer)
                    while len(view):
                        view = view[file.write(view) :]
                if durable:
                    os.fsync(file.fileno())
            part.replace(path)
            if durable:
                for folder in (path.parent, self._root):
                    _sync_folder(folder)
        finally:
            part.unlink(missing_ok=True)

    def _hand_over(self, what: Path | int) -> None:
        """Give a new file or folder the same owner as the store.

        A worker in a container runs as root. The services that share the store run as another user, who must
        be able to read and delete these files.
        """
        if os.geteuid() == 0:
            owner = self._root.stat()
            os.chown(what, owner.st_uid, owner.st_gid)

    def read(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def read_parts(self, key: str, sizes: Sequence[int]) -> list[Buffer]:
        with (self._root / key).open("rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != sum(sizes):
                raise Unavailable(f"a blob has {found} bytes, but its claim says {sum(sizes)}")
            return [_read_exactly(file, size) for size in sizes]

    def delete(self, key: str) -> None:
        (self._root / key).unlink(missing_ok=True)

    def sweep(self, now: float) -> int:
        try:
            buckets = [entry for entry in self._root.iterdir() if _has_expired(entry.name, now)]
        except FileNotFoundError:
            return 0
        for bucket in buckets:
            shutil.rmtree(bucket)
        return len(buckets)


def _sync_folder(folder: Path) -> None:
    """Write a folder's list of files to disk.

    Without this, a new file could disappear from the folder after a loss of power.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_exactly(file: Any, size: int) -> bytes:
    first: bytes = file.read(size)  # allocates the memory only once, but returns at most 2 GiB
    pieces = [first]
    while (missing := size - sum(map(len, pieces))) > 0:
        pieces.append(file.read(missing))
        if not pieces[-1]:
            raise Unavailable("a blob has become shorter while it was read")
    return b"".join(pieces) if len(pieces) > 1 else first


class _Remote(_Place):
    """A blob store in an object store, or in another store that is not a folder."""

    def __init__(self, url: str) -> None:
        self._fs, self._root, *_ = object_store.opened(url)

    def write(self, key: str, buffers: Sequence[Buffer], durable: bool) -> None:
        self._fs.pipe_file(f"{self._root}/{key}", b"".join(buffers))

    def read(self, key: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self._root}/{key}"))

    def read_parts(self, key: str, sizes: Sequence[int]) -> list[Buffer]:
        whole = memoryview(self.read(key))
        if len(whole) != sum(sizes):
            raise Unavailable(f"a blob has {len(whole)} bytes, but its claim says {sum(sizes)}")
        parts: list[Buffer] = []
        at = 0
        for size in sizes:
            parts.append(whole[at : at + size])
            at += size
        return parts

    def delete(self, key: str) -> None:
        self._fs.rm_file(f"{self._root}/{key}")

    def sweep(self, now: float) -> int:
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            names = [entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=False)]
            expired = [name for name in names if _has_expired(name, now)]
            for name in expired:
                self._fs.rm(f"{self._root}/{name}", recursive=True)
            return len(expired)
        return 0


def _has_expired(name: str, now: float) -> bool:
    return _BUCKET.fullmatch(name) is not None and int(name) <= now
