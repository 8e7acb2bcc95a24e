"""The store of asynchronous inference: callers put inputs there, and the gateway writes the answers."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from tidegate.kernel.blobs import object_store
from tidegate.kernel.blobs.object_store import PIECE, Stream
from tidegate.kernel.errors import NotFound, PayloadTooLarge, Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class AsyncStore:
    """The store at ``url``. Its methods use a thread, so a slow store does not block the event loop.

    ``root``: the URL without a slash at its end.
    """

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._store = object_store.opened(url)
        self._is_local = "file" in self._store.files.protocol

    def location(self, key: str) -> str:
        """Return the URL of a file."""
        return f"{self.root}/{key}"

    async def read(self, key: str, most_bytes: int) -> bytes:
        """Return an input.

        Raise NotFound if it does not exist, PayloadTooLarge if it has more than ``most_bytes`` bytes, and
        Unavailable if the store fails.
        """
        return await self._do(self._read, key, most_bytes)

    async def write(self, key: str, content: bytes) -> None:
        """Write a file. Raise Unavailable if the store fails."""
        await self._do(self._write, key, content)

    def _read(self, key: str, most_bytes: int) -> bytes:
        try:
            path, root = f"{self._store.root}/{key}", self._store.root
            stream = _local(path, root) if self._is_local else self._store.stream(path)
        except FileNotFoundError:
            raise NotFound(f"the input {self.location(key)} does not exist: upload it first") from None
        found = bytearray()
        try:
            for piece in stream.pieces:
                found += piece
                if len(found) > most_bytes:
                    raise PayloadTooLarge(f"the input is larger than the limit of {most_bytes} bytes")
        finally:
            stream.close()
        return bytes(found)

    def _write(self, key: str, content: bytes) -> None:
        path = f"{self._store.root}/{key}"
        with suppress(FileExistsError):
            self._store.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not self._is_local:
            self._store.files.pipe_file(path, content)
            return
        # Write to another file first, then rename it. Otherwise a caller that waits for this file could read
        # an incomplete file.
        part = Path(f"{path}.{os.urandom(6).hex()}.part")
        try:
            part.write_bytes(content)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    async def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(call, *args, **kwargs)
        except (NotFound, PayloadTooLarge):
            raise
        except Exception as error:  # each driver has its own exceptions
            raise Unavailable(
                f"the store of asynchronous inference (TIDEGATE_ASYNC_URL) failed: {error}. "
                "Send the request again"
            ) from error


def _local(path: str, root: str) -> Stream:
    """Open a plain file in the folder ``root``. Raise FileNotFoundError for any other file.

    Users of this host put inputs into the folder. A link to a file outside the folder could give a user the
    gateway's own files. Reading a pipe would never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    place = Path(os.path.realpath(f"/proc/self/fd/{handle}"))
    if not stat.S_ISREG(os.fstat(handle).st_mode) or not place.is_relative_to(os.path.realpath(root)):
        os.close(handle)
        raise FileNotFoundError(path)
    file = os.fdopen(handle, "rb")
    return Stream(iter(partial(file.read, PIECE), b""), file.close)
