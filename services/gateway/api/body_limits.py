"""What bodies may cost: their size, and the memory of all that are in hand, counted while they come in."""

from __future__ import annotations

from services.gateway.domain.memory_budget import MemoryBudget
from tidegate.kernel.errors import Overloaded, PayloadTooLarge, TidegateError
from tidegate.kernel.http.heads import number
from tidegate.kernel.protocol.envelope import Buffer

Headers = dict[bytes, bytes]
RETRY_AFTER_S = 1.0
STEP = 2**20


class BodyLimits:
    """A gateway process's limits. ``bodies`` counts requests in hand, ``answers`` what is not sent yet."""

    def __init__(
        self, *, body_bytes: int, json_bytes: int, bodies: MemoryBudget, answers: MemoryBudget
    ) -> None:
        self.body_bytes = body_bytes
        self.json_bytes = json_bytes
        self.bodies = bodies
        self.answers = answers

    def at_head(self, headers: Headers, *, known: bool = False) -> TidegateError | None:
        """Return why a request is refused before its body has come, or None.

        ``known``: its caller has shown a good credential.
        """
        # The parser takes white space behind the number, and refuses what is no number.
        size = number(headers.get(b"content-length", b"0")) or 0
        if size > self.body_bytes:
            return self.too_large()
        if not self.bodies.room(size, known=known) or not self.answers.room(0):
            return self.overloaded()
        return None

    def too_large(self) -> PayloadTooLarge:
        """The body is over the limit."""
        return PayloadTooLarge(f"the body is larger than {self.body_bytes} bytes")

    def overloaded(self) -> Overloaded:
        """There is no memory for it now."""
        return Overloaded(
            f"this gateway holds {self.bodies.used} bytes of requests and {self.answers.used} of answers; "
            f"the limit is {self.bodies.limit} of each",
            retry_after_s=RETRY_AFTER_S,
        )

    def check_json(self, size: int) -> None:
        """The JSON part is decoded into values many times its size; raises PayloadTooLarge."""
        if size > self.json_bytes:
            raise PayloadTooLarge(
                f"the JSON part has {size} bytes, the limit is {self.json_bytes}: "
                "send large tensors as binary data"
            )

    def check_structure(self, size: int) -> None:
        """The same for a gRPC message's part outside of its raw tensors; raises PayloadTooLarge."""
        if size > self.json_bytes:
            raise PayloadTooLarge(
                f"the request has {size} bytes outside its raw tensors; the limit is {self.json_bytes}: "
                "send large tensors as raw_input_contents"
            )


class Body:
    """A body as it comes in. It counts against the budget until :meth:`release`.

    Either by :meth:`add`, or, when its size is known, in place: :meth:`expect`, then into :meth:`window`,
    telling :meth:`took`. Memory grows by steps, so that who declares much and sends little takes little.
    """

    __slots__ = ("_data", "_known", "_limits", "_size", "_total", "held", "taking")

    def __init__(self, limits: BodyLimits, begun: bytes = b"", *, known: bool = False) -> None:
        """``begun``: what has come already and is counted. ``known``: of a caller with a good credential."""
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
        """Whether all that was expected has come."""
        return self._size == self._total

    def add(self, chunk: bytes) -> TidegateError | None:
        """Take more of it; gives why it is refused, when it is."""
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
        """From here on it comes in place, up to ``total`` bytes; gives why it is refused, when it is."""
        self._total = total
        self._data = bytearray(self._data)
        return self._make_room()

    def window(self) -> memoryview:
        """Where the next bytes belong."""
        assert isinstance(self._data, bytearray)
        if len(self._data) < self.held:
            self._data += bytes(self.held - len(self._data))
        return memoryview(self._data)[self._size :]

    def took(self, count: int) -> TidegateError | None:
        """``count`` bytes are in the window; gives why the rest is refused, when it is."""
        self._size += count
        return self._make_room() if self._size == self.held and not self.complete else None

    def whole(self) -> Buffer:
        """All of it, uncopied; the budget goes on counting it."""
        data, self._data = self._data, b""
        return data if isinstance(data, bytes) else memoryview(data)

    def release(self) -> None:
        """It is no longer needed."""
        self._limits.bodies.give(self.held)
        self.held = 0
        self._data = b""

    def _make_room(self) -> TidegateError | None:
        """Room for the next step; the memory itself is taken by :meth:`window`, when nobody reads into it."""
        step = min(STEP, self._total - self._size)
        return None if self._take(step, self._total) else self._limits.overloaded()

    def _take(self, count: int, of: int) -> bool:
        self.taking = True  # a body that makes room for itself must not be the one that goes
        taken = self._limits.bodies.take(count, of, known=self._known)
        self.taking = False
        if taken:
            self.held += count
        return taken


class UploadMemory:
    """Count the memory of an upload that is stored as it comes, against the budget.

    ``known``: its caller has shown a good credential.
    """

    def __init__(self, limits: BodyLimits, *, known: bool = False) -> None:
        self._limits = limits
        self._known = known
        self._held = 0

    def resize(self, size: int) -> None:
        """So many bytes are held from now on; raises Overloaded when there is no room for them."""
        more = size - self._held
        if more <= 0:
            self._limits.bodies.give(-more)
        elif not self._limits.bodies.take(more, size, known=self._known):
            raise self._limits.overloaded()
        self._held = size

    def release(self) -> None:
        """Nothing is held any more."""
        self.resize(0)
