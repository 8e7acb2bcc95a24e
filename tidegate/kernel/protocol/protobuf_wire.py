"""Read protobuf's wire format in place. A skipped field costs only its header, and no memory.

A message library would load the whole file with its weights before it returns an input's name.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmap import mmap


VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# The highest valid field number. Some libraries accept higher ones, and others do not.
MAX_NUMBER = 2**29 - 1


class Malformed(Exception):
    """The bytes are not a protobuf message, or the message has too many fields."""


@dataclass(slots=True)
class Budget:
    """The number of fields that may still be read. Gigabytes of tiny fields must not block a thread."""

    fields: int = 5_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """A message in ``data[start:end]``."""

    data: mmap | bytes
    start: int
    end: int
    budget: Budget

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """Yield field numbers with values: numbers as int, anything with a length as a Message.

        A field may occur more than once. Protobuf merges all occurrences of a singular message. For a number,
        the last occurrence with the field's wire type counts, cut to the field's width.
        """
        at = self.start
        while at < self.end:
            self.budget.fields -= 1
            if self.budget.fields < 0:
                raise Malformed("it has too many fields")
            key, at = self._varint(at)
            number, wire = key >> 3, key & 7
            if not 0 < number <= MAX_NUMBER:
                raise Malformed(
                    f"not in protobuf's format: the field number {number} is not in 1 to {MAX_NUMBER}"
                )
            value: int | Message
            if wire == VARINT:
                value, at = self._varint(at)
            elif wire == BYTES:
                length, at = self._varint(at)
                value, at = Message(self.data, at, at + length, self.budget), at + length
            elif wire in (FIXED32, FIXED64):
                width = 4 if wire == FIXED32 else 8
                value, at = int.from_bytes(self.data[at : at + width], "little"), at + width
            else:
                raise Malformed(f"not in protobuf's format: it has a field of wire type {wire}")
            if at > self.end:
                raise Malformed("a field reaches past the end; perhaps the copy is incomplete")
            yield number, value

    def messages(self, number: int) -> Iterator[Message]:
        """Yield the fields of this number that have a length."""
        for found, value in self.fields():
            if found == number and isinstance(value, Message):
                yield value

    def text(self, limit: int = 4096) -> str:
        """Return the bytes as text. Raises Malformed if they are not UTF-8, or more than ``limit``."""
        if self.end - self.start > limit:
            raise Malformed(f"it has a name of more than {limit} bytes")
        try:
            return self.data[self.start : self.end].decode()
        except UnicodeDecodeError:
            raise Malformed("it has a name that is not UTF-8") from None

    def _varint(self, at: int) -> tuple[int, int]:
        result = shift = 0
        while True:
            if at >= self.end or shift > 63:
                raise Malformed(
                    "a number is cut off or has more than 64 bits; perhaps the copy is incomplete"
                )
            byte = self.data[at]
            result |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return result, at
