"""Pass large tensors between a worker and its Triton through shared memory.

A region is created as a file, registered with Triton and then unlinked. After that, the kernel frees its
memory as soon as neither process has it mapped, also after a crash. If the worker ends before it unlinks the
file, the file remains. Before Triton starts again in the same folder, the worker removes such files. It finds
them by the prefix of their names.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from services.worker.adapters.triton_client import TritonClient
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.envelope import Buffer

log = telemetry.logger(__name__)

FOLDER = Path("/dev/shm")
SMALLEST = 2**20
# A region with more bytes than this is not reused. It is unregistered after its call.
KEPT_LIMIT = 64 * 2**20
# The largest total size of all regions of one Triton, in bytes.
TOTAL_LIMIT = 512 * 2**20
# Seconds after which the region of an abandoned call is unregistered. Until then, Triton may still write to
# the region.
RETIRED_S = 120.0
ALIGNMENT = 64


class Place(NamedTuple):
    """The position of one tensor in a region. ``offset`` and ``size`` are in bytes."""

    region: str
    offset: int
    size: int


class Region:
    """A block of shared memory that is registered with Triton as ``name``.

    ``put`` and ``reserve`` assign its bytes to tensors, one after another from the start.
    """

    def __init__(self, path: Path, size: int, owner: int | None = None) -> None:
        """Create the file and map it. Raise OSError if there is not enough memory.

        ``owner`` is the user that Triton runs as; None means the user of this process.
        """
        self._path = path
        self.name = path.name
        self.size = size
        self._at = 0
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserve the memory now. If it ran out during a write to the mapped file, the kernel would kill
            # this process.
            os.posix_fallocate(handle, 0, size)
            if owner is not None:
                os.fchown(handle, owner, -1)
            self._view = memoryview(
                mmap.mmap(handle, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE)
            )
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(handle)

    def unlink(self) -> None:
        """Remove the region's name. The memory stays until no process has it mapped."""
        self._path.unlink(missing_ok=True)

    def rewind(self) -> None:
        """Let the next tensor start at the beginning of the region. It may overwrite earlier tensors."""
        self._at = 0

    def put(self, pieces: Sequence[Buffer]) -> Place:
        """Copy the pieces of a tensor to the next unused bytes of the region. Return the tensor's place."""
        at = self._at
        for piece in pieces:
            self._view[at : at + len(piece)] = piece
            at += len(piece)
        return self.reserve(at - self._at)

    def reserve(self, size: int) -> Place:
        """Reserve the next ``size`` bytes of the region, and return their place."""
        place = Place(self.name, self._at, size)
        self._at += aligned(size)
        return place

    def read(self, at: int, size: int) -> bytes:
        """Return a copy of the bytes at a place."""
        return bytes(self._view[at : at + size])


def aligned(size: int) -> int:
    """Return how many bytes a tensor of ``size`` bytes needs in a region, with its alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Regions:
    """Create the regions of one Triton, and reuse them for later calls.

    ``folder`` is the folder that Triton sees as /dev/shm. ``owner`` is the user that Triton runs as; None
    means the user of this process.
    """

    def __init__(
        self, client: TritonClient, prefix: str, folder: Path | None = None, owner: int | None = None
    ) -> None:
        self._client = client
        self._prefix = prefix
        self._folder = folder
        self._owner = owner
        self._numbers = count()
        self._free: list[Region] = []
        self._in_use = 0
        self._retired: dict[Region, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def acquire(self, size: int) -> Region | None:
        """Return a region of at least ``size`` bytes for one call.

        Return None if all regions together would exceed TOTAL_LIMIT, or if the region cannot be created.
        """
        fitting = [region for region in self._free if region.size >= size]
        if fitting:
            region = min(fitting, key=lambda found: found.size)
            self._free.remove(region)
            region.rewind()
            return region
        size = max(SMALLEST, 1 << (size - 1).bit_length())
        while self._free and self._in_use + size > TOTAL_LIMIT:
            self._unregister_soon(self._free.pop(0))
        if self._in_use + size > TOTAL_LIMIT:
            return None
        making = asyncio.create_task(self._create(size))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self._on_unwanted)
            raise

    def release(self, region: Region) -> None:
        """Take back the region of a call that has ended.

        A region of at most KEPT_LIMIT bytes is reused by other calls. A larger region is unregistered.
        """
        if region.size > KEPT_LIMIT:
            self._unregister_soon(region)
        else:
            self._free.append(region)

    def retire(self, region: Region) -> None:
        """Unregister the region of an abandoned call, but only after ``RETIRED_S`` seconds.

        Until then, Triton may still use the region.
        """
        loop = asyncio.get_running_loop()
        self._retired[region] = loop.call_later(RETIRED_S, self._on_retired, region)

    async def close(self) -> None:
        """Forget all regions. Call this when Triton has ended or gets no more calls."""
        for handle in self._retired.values():
            handle.cancel()
        self._retired.clear()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._free.clear()

    async def _create(self, size: int) -> Region | None:
        name = f"{self._prefix}-io-{os.getpid()}-{next(self._numbers)}"
        self._in_use += size
        try:
            region = await asyncio.to_thread(Region, (self._folder or FOLDER) / name, size, self._owner)
        except OSError as error:
            self._in_use -= size
            log.warning(
                "shared memory could not be created; the call does not use it",
                extra={"bytes": size, "problem": str(error)},
            )
            return None
        try:
            await self._client.register_region(name, size)
        except TidegateError as error:
            self._in_use -= size
            log.warning("Triton refuses shared memory", extra={"problem": error.message})
            return None
        finally:
            region.unlink()
        return region

    def _on_unwanted(self, making: asyncio.Task[Region | None]) -> None:
        region = making.result()
        if region is not None:
            self.release(region)

    def _on_retired(self, region: Region) -> None:
        del self._retired[region]
        self._unregister_soon(region)

    def _unregister_soon(self, region: Region) -> None:
        task = asyncio.create_task(self._unregister(region))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unregister(self, region: Region) -> None:
        try:
            await self._client.unregister_region(region.name)
        except Unavailable:
            return  # Triton has ended, so it has no mappings
        except TidegateError as error:
            log.warning(
                "Triton did not unregister a region of shared memory", extra={"problem": error.message}
            )
        self._in_use -= region.size
