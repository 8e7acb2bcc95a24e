"""Read protobuf's wire format without copying it. Skip the content of fields that are not needed.

A protobuf library would load a whole model file, with its weights, only to return the name of an input.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmap import mmap


VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# The highest valid field number. Higher ones are refused, because libraries differ in how they read them.
MAX_NUMBER = 2**29 - 1


class Malformed(Exception):
    """An error: the bytes are not a protobuf message, or the message has too many fields."""


@dataclass(slots=True)
class Budget:
    """The number of fields that may still be read.

    It stops a file of countless tiny fields from blocking a thread.
    """

    fields: int = 5_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """A protobuf message, stored in ``data[start:end]``."""

    data: mmap | bytes
    start: int
    end: int
    budget: Budget

    def fields(self) -> Iterator[tuple[int, int | Message]]:
        """Yield the number and the value of each field: a Message if the value has a length, else an int.

        If a field occurs several times, every occurrence is yielded, and the calling code decides which one
        to use. Protobuf libraries merge all occurrences of a message that is not declared as repeated. For a
        number, they use the last occurrence with the declared wire type, and cut it to the declared width.
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
        """Yield each field with this number as a Message. Occurrences without a length are skipped."""
        for found, value in self.fields():
            if found == number and isinstance(value, Message):
                yield value

    def text(self, limit: int = 4096) -> str:
        """Return the bytes as text. Raises Malformed if they are not UTF-8, or more than ``limit`` bytes."""
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
