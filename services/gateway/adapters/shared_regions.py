"""Shared memory segments of callers on this host, registered under names as in Triton.

A segment is read and written with ``pread`` and ``pwrite``, and never mapped. If the owner made a mapped
segment shorter, this process would end with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from services.gateway.adapters.region_table import RegionTable
from services.gateway.domain import shared_memory
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.shared_memory import RegionPart
from tidegate.kernel.errors import BadRequest, Conflict, Forbidden, NotFound, Overloaded, TooMany
from tidegate.kernel.protocol.envelope import Buffer

FOLDER = Path("/dev/shm")
# MOST_OF_ONE is the limit of the regions of one caller. MOST is the limit of the regions of all callers
# together. There are limits because each region needs a file descriptor.
MOST_OF_ONE, MOST = 256, 1024
ROOT = 0


class Region:
    """A registered part of a segment. The segment stays open as long as this object exists."""

    __slots__ = ("_handle", "identity", "key", "offset", "size")

    def __init__(self, handle: int, key: str, offset: int, size: int) -> None:
        self._handle = handle
        found = os.fstat(handle)
        self.identity = (found.st_dev, found.st_ino)
        self.key = key
        self.offset = offset
        self.size = size

    def __del__(self) -> None:
        os.close(self._handle)

    def read(self, part: RegionPart, into: bytearray) -> None:
        """Copy ``part`` of the region to ``into``; raise BadRequest if the segment is now too short."""
        got = os.preadv(self._handle, [into], self.offset + part.offset) if into else 0
        while 0 < got < len(into):
            more = os.preadv(self._handle, [memoryview(into)[got:]], self.offset + part.offset + got)
            if not more:
                break
            got += more
        if got < len(into):
            raise self._shrunk(part)

    def write(self, part: RegionPart, data: Buffer) -> None:
        """Write ``data`` to ``part`` of the region; raise BadRequest if the segment is now too short."""
        begin = self.offset + part.offset
        if os.fstat(self._handle).st_size < begin + len(data):
            raise self._shrunk(part)
        rest = memoryview(data).cast("B")
        while len(rest):
            written = os.pwrite(self._handle, rest, begin)
            begin, rest = begin + written, rest[written:]

    def _shrunk(self, part: RegionPart) -> BadRequest:
        return BadRequest(
            f"Invalid shared memory region: {part.region!r}: its segment {self.key!r} is shorter than when "
            "it was registered. Unregister it, and register it with its new size"
        )


class SharedRegions:
    """The regions of all callers. Each region is registered under its caller's id and a name."""

    def __init__(
        self, budget: MemoryBudget, body_bytes: int, table: Path | None = None, folder: Path = FOLDER
    ) -> None:
        """``budget``: the memory budget for copies of tensors.

        ``body_bytes``: the most bytes of one copy.

        ``table``: the file with which several gateway processes share the registrations. It is None if there
        is only one process.
        """
        self._budget = budget
        self._body_bytes = body_bytes
        self._folder = folder
        self._regions: dict[tuple[str, str], Region] = {}
        self._table = None if table is None else RegionTable(table)

    def register(self, owner: str, name: str, key: str, offset: int, size: int, user: int | None) -> None:
        """Register a part of a segment.

        ``user``: the caller's user id; None if the caller is not on this host.

        Raise BadRequest if the segment cannot be opened or an argument is invalid. Raise Forbidden if the
        caller may not use the segment. Raise Conflict if the name is in use. Raise TooMany if too many
        regions are registered.
        """
        shared_memory.check_name(name)
        file = shared_memory.file_of(name, key)
        self._refresh()
        if (owner, name) in self._regions:
            raise Conflict(
                f"shared memory region {name!r} already in manager: unregister it first, or use another name"
            )
        of_owner = sum(1 for each, _ in self._regions if each == owner)
        if of_owner >= MOST_OF_ONE or len(self._regions) >= MOST:
            raise TooMany(
                f"{of_owner} shared memory regions of this caller are registered. The limit is "
                f"{MOST_OF_ONE} ({MOST} for all callers together): unregister some"
            )
        region = self._open(name, key, file, offset, size, user)
        self._regions[owner, name] = region
        if self._table is not None:
            self._table.put(owner, name, [key, file, offset, size, *region.identity])

    def unregister(self, owner: str, name: str = "") -> None:
        """Unregister one region of a caller, or all of them if ``name`` is empty. Ignore an unknown name."""
        self._refresh()
        for found in [each for each in self._regions if each[0] == owner and name in ("", each[1])]:
            del self._regions[found]
        if self._table is not None:
            self._table.remove(owner, name)

    def status(self, owner: str, name: str = "") -> list[dict[str, Any]]:
        """Return a caller's regions, or only the region ``name``.

        Raise NotFound if the region ``name`` is not registered.
        """
        self._refresh()
        found = [
            {"name": each, "key": region.key, "offset": region.offset, "byte_size": region.size}
            for (whose, each), region in self._regions.items()
            if whose == owner and name in ("", each)
        ]
        if name and not found:
            raise NotFound(
                f"Unable to find system shared memory region: {name!r}: a status request without a name "
                "lists your regions"
            )
        return sorted(found, key=lambda each: str(each["name"]))

    def of(self, owner: str) -> CallersRegions:
        """Return an object through which a request uses the regions of one caller."""
        return CallersRegions(self, owner)

    def find(self, owner: str, part: RegionPart) -> Region:
        """Return the region that contains a part.

        Raise NotFound if the region is not registered. Raise BadRequest if the part is not inside the region.
        """
        region = self._regions.get((owner, part.region))
        if region is None or self._table is not None:
            self._refresh()
            region = self._regions.get((owner, part.region))
        if region is None:
            raise NotFound(
                f"Unable to find shared memory region: {part.region!r}: register it first, with the same "
                "credential"
            )
        shared_memory.check_part(part, region.size)
        return region

    def room(self, size: int) -> Copy:
        """Reserve ``size`` bytes in the memory budget, and return memory for a copy of a tensor.

        Raise BadRequest if the tensor is too large, and Overloaded if the memory budget is full.
        """
        if size > self._body_bytes:
            raise BadRequest(
                f"a tensor in shared memory has {size} bytes, but the limit is {self._body_bytes} "
                "(TIDEGATE_MAX_BODY_BYTES)"
            )
        if not self._budget.take(size):
            raise Overloaded("the gateway's memory for requests is full: try again", retry_after_s=1.0)
        return Copy(self._budget, size)

    def _open(self, name: str, key: str, file: str, offset: int, size: int, user: int | None) -> Region:
        try:
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self._folder / file, flags)
        except OSError as error:
            raise BadRequest(
                f"Unable to open shared memory region: {key!r}: {error.strerror}. It must exist on the "
                "gateway's host, and the gateway's user must be able to read and write it"
            ) from None
        region = Region(handle, key, offset, size)
        found = os.fstat(handle)
        if user is None or user not in (found.st_uid, ROOT):
            raise Forbidden(
                f"failed to register shared memory region {name!r}: only a program on the gateway's host may "
                "register one, and only a segment of its own user"
            )
        if not stat.S_ISREG(found.st_mode):
            raise BadRequest(
                f"Unable to open shared memory region: {key!r}: it is not a shared memory segment"
            )
        shared_memory.check_extent(name, offset, size, found.st_size)
        return region

    def _refresh(self) -> None:
        """Add the regions that other gateway processes registered; remove those that they unregistered."""
        entries = None if self._table is None else self._table.changed()
        if entries is None:
            return
        self._regions = {
            owned: self._regions[owned] for owned in self._regions.keys() & entries.keys()
            if list(self._regions[owned].identity) == entries[owned][4:]
        }  # fmt: skip
        for owned in entries.keys() - self._regions.keys():
            if (region := self._reopened(entries[owned])) is not None:
                self._regions[owned] = region

    def _reopened(self, entry: list[Any]) -> Region | None:
        """Return a region that another process registered; None if its segment is no longer there."""
        key, file, offset, size, *identity = entry
        try:
            handle = os.open(self._folder / file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        region = Region(handle, key, offset, size)
        return region if list(region.identity) == identity else None


class Copy(bytearray):
    """A copy of a tensor. The memory budget counts the copy until it is freed."""

    __slots__ = ("_budget", "_counted")

    def __init__(self, budget: MemoryBudget, size: int) -> None:
        self._budget = budget
        self._counted = size
        super().__init__(size)

    def __del__(self) -> None:
        self._budget.release(self._counted)


class CallersRegions:
    """The regions of one caller, to read inputs from and to write outputs to."""

    def __init__(self, regions: SharedRegions, owner: str) -> None:
        self._regions = regions
        self._owner = owner

    def read(self, part: RegionPart) -> Buffer:
        """Return a copy of a part of a region.

        Raise NotFound if the region is not registered. Raise BadRequest if the part is too large, or is not
        inside the region and the segment. Raise Overloaded if the memory budget is full.
        """
        region = self._regions.find(self._owner, part)
        copy = self._regions.room(part.size)
        region.read(part, copy)
        return memoryview(copy)

    def sink(self, part: RegionPart) -> RegionSink:
        """Return a writer of an output to a part of a region.

        Raise NotFound if the region is not registered. Raise BadRequest if the part is not inside the region.
        """
        return RegionSink(self._regions.find(self._owner, part), part)


class RegionSink:
    """A writer of an output to a part of a region. The region stays open as long as the writer exists."""

    def __init__(self, region: Region, part: RegionPart) -> None:
        self._region = region
        self.part = part

    def write(self, output: str, data: Buffer) -> None:
        """Write an output; raise BadRequest if it does not fit."""
        if len(data) > self.part.size:
            raise shared_memory.too_small(self.part, output, len(data))
        self._region.write(self.part, data)
