"""Split uploaded files into lines, and write lines to the blob store in chunks, with bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from services.gateway.domain.batches import FileChunk
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.errors import BadRequest, PayloadTooLarge

CHUNK_BYTES = 2**20
CHUNK_LINES = 10_000


class LineWriter:
    """A writer of lines in chunks. The blob store keeps each chunk for ``keep_s`` seconds.

    The writer holds at most one chunk and one more line in memory.
    """

    def __init__(self, blobs: Blobs, keep_s: float, *, most_bytes: int = CHUNK_BYTES) -> None:
        self._blobs = blobs
        self._keep_s = keep_s
        self._most_bytes = most_bytes
        self._lines: list[bytes] = []
        self.held = 0

    def add(self, line: bytes) -> bool:
        """Add a line without its newline. Return True if :meth:`write` must be called now."""
        self._lines.append(line)
        self.held += len(line) + 1
        return self.held >= self._most_bytes or len(self._lines) >= CHUNK_LINES

    async def write(self) -> FileChunk | None:
        """Write the collected lines as one chunk and return the chunk; return None if there are no lines.

        If this raises Unavailable, the lines stay in memory, so the next call writes them.
        """
        if not self._lines:
            return None
        lines, size = self._lines, self.held
        key = await self._blobs.put(b"\n".join((*lines, b"")), self._keep_s, durable=True)
        self._lines, self.held = [], 0
        return FileChunk(key, len(lines), size)


class LineSplitter:
    """A splitter of incoming bytes into lines.

    Raises PayloadTooLarge if the file or a line has too many bytes, and BadRequest for too many lines.
    """

    def __init__(self, *, line_bytes: int, total_bytes: int, lines: int) -> None:
        self._line_bytes = line_bytes
        self._total_bytes = total_bytes
        self._most_lines = lines
        self._rest = bytearray()
        self._total = 0
        self.lines = 0

    @property
    def held(self) -> int:
        """Return the number of bytes of the incomplete line."""
        return len(self._rest)

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes. Return the lines that are now complete.

        Whitespace at both ends of a line is removed, and blank lines are left out.
        """
        self._total += len(data)
        if self._total > self._total_bytes:
            raise PayloadTooLarge(
                f"the file is larger than {self._total_bytes} bytes: split it into several batches"
            )
        head, newline, tail = data.partition(b"\n")
        if len(self._rest) + len(head) > self._line_bytes:
            raise self._too_long(self.lines + 1)
        self._rest += head
        complete: list[bytes] = []
        if newline:
            first, (*whole, rest) = bytes(self._rest), tail.split(b"\n")
            complete, self._rest = self._checked([first, *whole]), bytearray(rest)
        if len(self._rest) > self._line_bytes:  # an incomplete line that is too long already
            raise self._too_long(self.lines + 1)
        return complete

    def end(self) -> list[bytes]:
        """Return the last line, if the file does not end with a newline."""
        rest, self._rest = bytes(self._rest), bytearray()
        return self._checked([rest])

    def _checked(self, lines: Sequence[bytes]) -> list[bytes]:
        checked = [line for raw in lines if (line := raw.strip())]
        for number, line in enumerate(checked, self.lines + 1):
            if len(line) > self._line_bytes:
                raise self._too_long(number)
        self.lines += len(checked)
        if self.lines > self._most_lines:
            raise BadRequest(
                f"the file has more than {self._most_lines} lines: split it into several batches"
            )
        return checked

    def _too_long(self, number: int) -> PayloadTooLarge:
        return PayloadTooLarge(f"line {number} is longer than {self._line_bytes} bytes")


class RawPiece(NamedTuple):
    """Complete lines of a file, as they were sent. ``lines``: how many of them are not blank."""

    data: bytes
    lines: int


class RawLines:
    """A splitter of incoming bytes into pieces of complete lines. All pieces together equal the file.

    Raises PayloadTooLarge if the file or a line has too many bytes, and BadRequest for too many lines.
    """

    def __init__(self, *, line_bytes: int, total_bytes: int, lines: int) -> None:
        self._line_bytes = line_bytes
        self._total_bytes = total_bytes
        self._most_lines = lines
        self._rest = bytearray()
        self._tail = 0  # the number of bytes of the incomplete line
        self.size = 0
        self.lines = 0

    @property
    def held(self) -> int:
        """Return the number of bytes in memory."""
        return len(self._rest)

    def feed(self, data: bytes) -> RawPiece | None:
        """Add bytes. Return the next piece, or None while it would be too small.

        A piece is returned when the complete lines have at least ``CHUNK_BYTES`` bytes.
        """
        self.size += len(data)
        if self.size > self._total_bytes:
            raise PayloadTooLarge(f"the file is larger than {self._total_bytes} bytes: split it")
        end = data.rfind(b"\n") + 1
        self._tail = len(data) - end + (0 if end else self._tail)
        self._rest += data
        whole = len(self._rest) - self._tail
        if self._tail > self._line_bytes:
            raise PayloadTooLarge(
                f"line {self.lines + 1} or a later one is longer than {self._line_bytes} bytes"
            )
        if whole < CHUNK_BYTES:
            return None
        piece, self._rest = bytes(self._rest[:whole]), self._rest[whole:]
        return self._checked(piece)

    def end(self) -> RawPiece | None:
        """Return the last piece, or None if nothing is left."""
        piece, self._rest = bytes(self._rest), bytearray()
        return self._checked(piece) if piece else None

    def _checked(self, piece: bytes) -> RawPiece:
        count = 0
        for line in piece.split(b"\n"):
            if len(line) > self._line_bytes:
                raise PayloadTooLarge(
                    f"line {self.lines + count + 1} is longer than {self._line_bytes} bytes"
                )
            count += bool(line.strip())
        self.lines += count
        if self.lines > self._most_lines:
            raise BadRequest(f"the file has more than {self._most_lines} lines: split it")
        return RawPiece(piece, count)
