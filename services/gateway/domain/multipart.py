"""Parse multipart/form-data while it arrives, with bounded memory. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message
from typing import NamedTuple

from tidegate.kernel.errors import BadRequest

# A part with a larger head is refused. Most heads have a few hundred bytes.
HEAD_BYTES = 8 * 1024
# A Content-Disposition with more parameters is refused, because Python's parser is slow with many. A name and
# a filename are enough.
MAX_SEMICOLONS = 100
MAX_PARTS = 64
# RFC 2046 allows 70 characters.
MAX_BOUNDARY = 70
# Python's parser can take seconds for the parameters of a longer Content-Type.
MAX_CONTENT_TYPE = 1024


class PartBegin(NamedTuple):
    """The beginning of a part. ``filename`` is None for a plain field."""

    name: str
    filename: str | None


class PartData(NamedTuple):
    """Some bytes of the current part."""

    data: bytes


class PartEnd(NamedTuple):
    """The end of the current part."""


Event = PartBegin | PartData | PartEnd


def boundary_of(content_type: str) -> bytes:
    """Return the boundary in a Content-Type. Raises BadRequest if it is not multipart/form-data."""
    if len(content_type) > MAX_CONTENT_TYPE:
        raise BadRequest(f"the Content-Type must have at most {MAX_CONTENT_TYPE} characters")
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/form-data" or not boundary:
        raise BadRequest(
            f"expected a form (multipart/form-data with a boundary), got Content-Type {content_type[:80]!r}"
        )
    if len(boundary) > MAX_BOUNDARY or not boundary.isascii():
        raise BadRequest(f"the form's boundary must have at most {MAX_BOUNDARY} ASCII characters")
    return boundary.encode()


class MultipartReader:
    """Read one form that arrives in chunks.

    The reader keeps few bytes in memory: at most one head, or the last bytes of a chunk. These last bytes can
    be the start of a delimiter.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # Every delimiter except the first follows a line break. Add a line break at the start, so that the
        # first delimiter is found too.
        self._held = b"\r\n"
        self._in = "preamble"
        self._parts = 0

    @property
    def ended(self) -> bool:
        """Return True if the last delimiter was read."""
        return self._in == "end"

    def feed(self, data: bytes) -> Iterator[Event]:
        """Add bytes, and yield the events that they complete; raise BadRequest if the form is malformed."""
        self._held += data
        while True:
            before = len(self._held), self._in
            if self._in == "preamble":
                self._skip_preamble()
            elif self._in == "delimiter":
                self._read_delimiter()
            elif self._in == "head":
                yield from self._read_head()
            elif self._in == "body":
                yield from self._read_body()
            else:
                self._held = b""  # bytes after the last delimiter are ignored
            if (len(self._held), self._in) == before:
                return

    def end(self) -> None:
        """Raise BadRequest if the form is not complete."""
        if not self.ended:
            raise BadRequest("the form ends before its last boundary: the upload is not complete")

    def _skip_preamble(self) -> None:
        before, found, after = self._held.partition(self._delimiter)
        if found:
            self._held, self._in = after, "delimiter"
        else:
            self._held = before[-len(self._delimiter) :]

    def _read_delimiter(self) -> None:
        if self._held[:2] == b"--":
            self._held, self._in = b"", "end"
            return
        blank, found, after = self._held.partition(b"\r\n")
        if blank.strip(b" \t") or len(blank) > HEAD_BYTES:
            if self._held == b"-" or blank.strip(b" \t") == b"\r":
                return
            raise BadRequest("the form has unexpected bytes after a boundary: expected a line break or '--'")
        if found:
            self._held, self._in = after, "head"

    def _read_head(self) -> Iterator[Event]:
        # A head ends with two line breaks, but an empty head is only one line break. Add one line break
        # before each head, so that every head ends with two.
        head, found, after = (b"\r\n" + self._held).partition(b"\r\n\r\n")
        if len(head) > HEAD_BYTES:
            raise BadRequest(f"a part of the form has a head of more than {HEAD_BYTES} bytes")
        if not found:
            return
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts")
        self._held, self._in = after, "body"
        yield _begin(head)

    def _read_body(self) -> Iterator[Event]:
        before, found, after = self._held.partition(self._delimiter)
        if found:
            self._held, self._in = after, "delimiter"
            if before:
                yield PartData(before)
            yield PartEnd()
            return
        # Keep the last bytes, because they can be the start of a delimiter.
        safe = len(self._held) - len(self._delimiter)
        if safe > 0:
            data, self._held = self._held[:safe], self._held[safe:]
            yield PartData(data)


def _begin(head: bytes) -> PartBegin:
    """Return a part's :class:`PartBegin` from its head; raise BadRequest if the head is invalid."""
    message = Message()
    for line in head.split(b"\r\n"):
        field, colon, value = line.partition(b":")
        if colon and field.strip().lower() == b"content-disposition":
            if value.count(b";") > MAX_SEMICOLONS:
                raise BadRequest(f"a Content-Disposition has more than {MAX_SEMICOLONS} parameters")
            message["content-disposition"] = value.strip().decode("utf-8", "replace")
    try:
        name, filename = message.get_param("name", header="content-disposition"), message.get_filename()
    except ValueError:  # the number of a continued parameter (RFC 2231) is too long
        name = filename = None
    if message.get_content_disposition() != "form-data" or not isinstance(name, str) or not name:
        raise BadRequest("each part of the form needs a Content-Disposition form-data with a name")
    return PartBegin(name, filename)
