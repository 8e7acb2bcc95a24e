"""The store of asynchronous inference: callers put inputs there, and the gateway writes the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from tidegate.kernel.blobs import object_store
from tidegate.kernel.errors import NotFound, PayloadTooLarge, Unavailable

P = ParamSpec("P")
T = TypeVar("T")


class AsyncStore:
    """The store at ``url``. Methods access it in a thread. ``root`` is the URL without a slash at its end."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._store = object_store.opened(url)

    def location(self, key: str) -> str:
        """Return the URL of a file."""
        return f"{self.root}/{key}"

    async def read(self, key: str, most_bytes: int) -> bytes:
        """Return an input. Raise NotFound, PayloadTooLarge, or Unavailable if the store fails."""
        return await self._do(self._read, key, most_bytes)

    async def write(self, key: str, content: bytes) -> None:
        """Write a file. Raise Unavailable if the store fails."""
        await self._do(self._write, key, content)

    def _read(self, key: str, most_bytes: int) -> bytes:
        try:
            stream = self._store.stream(f"{self._store.root}/{key}")
        except FileNotFoundError:
            raise NotFound(f"there is no input at {self.location(key)}") from None
        found = bytearray()
        try:
            for piece in stream.pieces:
                found += piece
                if len(found) > most_bytes:
                    raise PayloadTooLarge(f"the input is larger than {most_bytes} bytes")
        finally:
            stream.close()
        return bytes(found)

    def _write(self, key: str, content: bytes) -> None:
        path = f"{self._store.root}/{key}"
        with suppress(FileExistsError):
            self._store.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._store.files.pipe_file(path, content)

    async def _do(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(call, *args, **kwargs)
        except (NotFound, PayloadTooLarge):
            raise
        except Exception as error:  # each driver has its own exceptions
            raise Unavailable(f"The store of asynchronous inference has failed: {error}.") from error
