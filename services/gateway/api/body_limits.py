"""Limit the size of each body, and the memory of all bodies, while they arrive."""

from __future__ import annotations

from services.gateway.domain.memory_budget import MemoryBudget
from tidegate.kernel.errors import Overloaded, PayloadTooLarge, TidegateError
from tidegate.kernel.http.heads import number
from tidegate.kernel.protocol.envelope import Buffer

Headers = dict[bytes, bytes]
RETRY_AFTER_S = 1.0
STEP = 2**20


class BodyLimits:
    """The limits on bodies in a gateway process.

    ``body_bytes``: the most bytes of a body. ``json_bytes``: the most bytes of its JSON part. ``bodies``: the
    memory budget of all request bodies. ``answers``: the memory budget of answers that are not yet sent.
    """

    def __init__(
        self, *, body_bytes: int, json_bytes: int, bodies: MemoryBudget, answers: MemoryBudget
    ) -> None:
        self.body_bytes = body_bytes
        self.json_bytes = json_bytes
        self.bodies = bodies
        self.answers = answers

    def check_headers(self, headers: Headers, *, known: bool = False) -> TidegateError | None:
        """Return the error if a request must be refused before its body arrives, else None.

        ``known``: True if the caller has sent a valid credential.
        """
        # `number` accepts white space after the digits, as the HTTP parser does. The parser has already
        # refused a value that is not a number.
        size = number(headers.get(b"content-length", b"0")) or 0
        if size > self.body_bytes:
            return self.too_large()
        if not self.bodies.room(size, known=known) or not self.answers.room(0):
            return self.overloaded()
        return None

    def too_large(self) -> PayloadTooLarge:
        """Return the error for a body above the limit."""
        return PayloadTooLarge(
            f"the body is larger than the limit of {self.body_bytes} bytes (TIDEGATE_MAX_BODY_BYTES)"
        )

    def overloaded(self) -> Overloaded:
        """Return the error for a body that does not fit in the memory budget."""
        return Overloaded(
            f"this gateway's memory for bodies is full: {self.bodies.used} bytes of requests and "
            f"{self.answers.used} bytes of answers; the limit is {self.bodies.limit} for each. Try again",
            retry_after_s=RETRY_AFTER_S,
        )

    def check_json(self, size: int) -> None:
        """Raise PayloadTooLarge if the JSON part has too many bytes.

        The part has a limit because decoded JSON takes many times as much memory as its text.
        """
        if size > self.json_bytes:
            raise PayloadTooLarge(
                f"the JSON part has {size} bytes, but the limit is {self.json_bytes} "
                "(TIDEGATE_MAX_JSON_BYTES): send large tensors as binary data"
            )

    def check_structure(self, size: int) -> None:
        """Raise PayloadTooLarge if a gRPC message has too many bytes outside its raw tensors."""
        if size > self.json_bytes:
            raise PayloadTooLarge(
                f"the request has {size} bytes outside its raw tensors, but the limit is {self.json_bytes} "
                "(TIDEGATE_MAX_JSON_BYTES): send large tensors as raw_input_contents"
            )


class Body:
    """A body that arrives in pieces. The memory budget counts it until :meth:`release`.

    If the size is not known, the calling code must call :meth:`add` for each piece. If the size is known, it
    must call :meth:`expect` once. Then, for each piece, it must write the piece into :meth:`window` and call
    :meth:`took`.

    Memory is reserved step by step as bytes arrive, so a large Content-Length alone takes no memory.
    """

    __slots__ = ("_data", "_known", "_limits", "_size", "_total", "held", "taking")

    def __init__(self, limits: BodyLimits, begun: bytes = b"", *, known: bool = False) -> None:
        """``begun``: the beginning of the body, which the budget counts already.

        ``known``: True if the caller has sent a valid credential.
        """
        self._limits = limits
        self._known = known
        self._data: bytes | bytearray = begun
        self._size = len(begun)
        self._total = 0
        self.held = len(begun)
        self.taking = False

    def __len__(self) -> int:
        return self._size

    @property
    def complete(self) -> bool:
        """Return True if all expected bytes have arrived."""
        return self._size == self._total

    def add(self, chunk: bytes) -> TidegateError | None:
        """Add a piece. Return the error if the body is refused, or None."""
        size = self._size + len(chunk)
        if size > self._limits.body_bytes:
            return self._limits.too_large()
        if not self._take(len(chunk), size):
            return self._limits.overloaded()
        self._size = size
        if not self._data:
            self._data = chunk
        elif isinstance(self._data, bytes):
            self._data = bytearray(self._data) + chunk
        else:
            self._data += chunk
        return None

    def expect(self, total: int) -> TidegateError | None:
        """Prepare for ``total`` bytes in :meth:`window`. Return the error if the body is refused, or None."""
        self._total = total
        self._data = bytearray(self._data)
        return self._make_room()

    def window(self) -> memoryview:
        """Return a view of the memory into which the calling code writes the next bytes."""
        assert isinstance(self._data, bytearray)
        if len(self._data) < self.held:
            self._data += bytes(self.held - len(self._data))
        return memoryview(self._data)[self._size :]

    def took(self, count: int) -> TidegateError | None:
        """Count ``count`` bytes that were written into the window. Return an error if the body is refused."""
        self._size += count
        return self._make_room() if self._size == self.held and not self.complete else None

    def whole(self) -> Buffer:
        """Return the whole body without a copy. The memory budget counts it until :meth:`release`."""
        data, self._data = self._data, b""
        return data if isinstance(data, bytes) else memoryview(data)

    def release(self) -> None:
        """Free the body, and return its bytes to the memory budget."""
        self._limits.bodies.release(self.held)
        self.held = 0
        self._data = b""

    def _make_room(self) -> TidegateError | None:
        """Reserve the next bytes of the body. Return the error if the memory budget is full.

        :meth:`window` allocates the memory later, because the event loop may still use the previous window
        now.
        """
        step = min(STEP, self._total - self._size)
        return None if self._take(step, self._total) else self._limits.overloaded()

    def _take(self, count: int, of: int) -> bool:
        self.taking = True  # the memory budget may drop other bodies now, but not this one
        taken = self._limits.bodies.take(count, of, known=self._known)
        self.taking = False
        if taken:
            self.held += count
        return taken


class UploadMemory:
    """The memory of an upload, which the memory budget counts.

    The upload is stored while it arrives, so only a part of it is in memory. ``known``: True if the caller
    has sent a valid credential.
    """

    def __init__(self, limits: BodyLimits, *, known: bool = False) -> None:
        self._limits = limits
        self._known = known
        self._held = 0

    def resize(self, size: int) -> None:
        """Set the number of bytes in memory. Raise Overloaded if they do not fit in the memory budget."""
        more = size - self._held
        if more <= 0:
            self._limits.bodies.release(-more)
        elif not self._limits.bodies.take(more, size, known=self._known):
            raise self._limits.overloaded()
        self._held = size

    def release(self) -> None:
        """Return all bytes to the memory budget."""
        self.resize(0)
