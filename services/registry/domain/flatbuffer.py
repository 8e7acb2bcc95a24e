"""Read tables of a FlatBuffers message without copying it. Every offset is checked. Pure.

https://flatbuffers.dev/internals/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as attribute
from mmap import mmap

from services.registry.domain.json_outline import Malformed

MAX_TEXT = 4 * 1024 * 1024
MAX_ITEMS = 1_000_000


@dataclass(slots=True)
class Budget:
    """The remaining number of bytes of text that may be read from a message.

    Without this limit, many offsets that point to one long text would need too much memory.
    """

    text: int = 16 * MAX_TEXT


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a FlatBuffers message. Its methods take the number of a field in the schema.

    ``data[begin:end]``: the message. ``at``: the offset of the table in ``data``.
    """

    data: mmap | bytes
    begin: int
    end: int
    at: int
    budget: Budget = attribute(default_factory=Budget)

    def number(self, field: int, default: int = 0, code: str = "<i") -> int:
        """Return an integer field. ``code``: the field's format for :mod:`struct`."""
        at = self._place(field)
        return default if at is None else int(self._unpack(code, at))

    def text(self, field: int) -> str:
        """Return a text field; empty if it is absent."""
        at = self._place(field)
        return "" if at is None else self._text(self._follow(at))

    def table(self, field: int) -> Table | None:
        """Return a field that is a table, or None if it is absent."""
        at = self._place(field)
        return None if at is None else self._table(self._follow(at))

    def tables(self, field: int) -> Iterator[Table]:
        """Yield the tables in a vector field."""
        for at in self._items(field, 4):
            yield self._table(self._follow(at))

    def numbers(self, field: int, code: str = "<i", limit: int = 1024) -> list[int]:
        """Return the integers in a vector field. Raise Malformed if there are more than ``limit``."""
        places = list(self._items(field, struct.calcsize(code), limit))
        return [int(self._unpack(code, at)) for at in places]

    def _items(self, field: int, width: int, limit: int = MAX_ITEMS) -> range:
        place = self._place(field)
        if place is None:
            return range(0)
        at = self._follow(place)
        count = self._unpack("<I", at)
        if count > limit:
            raise Malformed(f"a list in the file has {count} items; the limit is {limit}")
        self._check(at + 4, count * width)
        return range(at + 4, at + 4 + count * width, width)

    def _place(self, field: int) -> int | None:
        table = self.at - self._unpack("<i", self.at)
        entry = 4 + 2 * field
        if entry + 2 > self._unpack("<H", table):
            return None
        offset = self._unpack("<H", table + entry)
        return self.at + offset if offset else None

    def _follow(self, at: int) -> int:
        return at + int(self._unpack("<I", at))

    def _table(self, at: int) -> Table:
        self._check(at, 4)
        return Table(self.data, self.begin, self.end, at, self.budget)

    def _text(self, at: int) -> str:
        length = self._unpack("<I", at)
        if length > MAX_TEXT:
            raise Malformed(f"a text in the file has {length} bytes; the limit is {MAX_TEXT}")
        self._check(at + 4, length)
        self.budget.text -= length
        if self.budget.text < 0:
            raise Malformed("the texts in the file are larger than the limit")
        return self.data[at + 4 : at + 4 + length].decode("utf-8", "replace")

    def _unpack(self, code: str, at: int) -> int:
        self._check(at, struct.calcsize(code))
        return int(struct.unpack_from(code, self.data, at)[0])

    def _check(self, at: int, size: int) -> None:
        if not (self.begin <= at and at + size <= self.end):
            raise Malformed("an offset points outside the file, so the copy may be broken")


def root(data: mmap | bytes, begin: int, end: int) -> Table:
    """Return the root table of a message. Raise Malformed if the message ends too early."""
    if not 0 <= begin <= end - 4 <= len(data) - 4:
        raise Malformed("the file ends too early, so the copy may be broken")
    return Table(data, begin, end, begin + struct.unpack_from("<I", data, begin)[0])
