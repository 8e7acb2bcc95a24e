"""JSON from outside, decoded within bounds of memory and time.

A JSON text becomes Python values of up to 35 times its size (``[],`` is 3 bytes and a list of 88), and
nothing else runs while it is decoded. So the parts of a large text are counted first, in a few percent of
the time that decoding takes.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from tidegate.kernel.errors import BadRequest, PayloadTooLarge

Buffer = bytes | memoryview

# A smaller text takes at most 10 MB and 20 ms, whatever is in it.
COUNTED_FROM = 256 * 1024
# The standard library's decoder, the only one that reads NaN, is five times slower.
MAX_VALUES_WITH_NAN = 2**21
# With fewer strings than this it is cheap to leave out what is inside them.
FEW_STRINGS = 2**16
_SLICE = 2**20


class Parts(NamedTuple):
    """Count the parts of a JSON text by kind."""

    values: int
    strings: int
    lists: int
    objects: int
    members: int


# Any text within these takes at most 500 MiB and 0.6 s of a processor (8 Mi numbers alone 480 MiB and 0.3 s).
MOST = Parts(values=2**23, strings=2**20 + 2**16, lists=2**19, objects=2**17, members=2**18)


def loads(raw: Buffer, what: str = "the request") -> Any:
    """Decode a JSON text; raises BadRequest when it is none, PayloadTooLarge when it has too many parts.

    Numbers may be ``NaN`` and ``Infinity``: they are no JSON, but Triton and its clients write them.
    """
    found = check(raw, what)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return _with_infinities(bytes(raw), error, what, found)


def check(raw: Buffer, what: str = "the request") -> Parts | None:
    """Count the parts of a text that is large enough to matter; raises PayloadTooLarge for too many."""
    if len(raw) <= COUNTED_FROM:
        return None
    found = count([raw])
    if _excess(found) and found.strings <= FEW_STRINGS:
        found = count(_outside_strings(bytes(raw)))
    if excess := _excess(found):
        name, has, may = excess
        raise PayloadTooLarge(
            f"{what} has {has} {name} in its JSON; the limit is {may}: send large tensors as binary data"
        )
    return found


def count(pieces: Sequence[Buffer]) -> Parts:
    """Count the parts of a JSON text: characters inside of strings count too."""
    import numpy as np  # here and not above: a worker never needs it, and its import is slow

    commas = colons = quotes = escaped = lists = objects = 0
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), _SLICE):
            part = view[at : at + _SLICE]
            found = np.frombuffer(part, np.uint8)
            commas += int(np.count_nonzero(found == 0x2C))
            colons += int(np.count_nonzero(found == 0x3A))
            lists += int(np.count_nonzero(found == 0x5B))
            objects += int(np.count_nonzero(found == 0x7B))
            is_quote = found == 0x22
            quotes += int(np.count_nonzero(is_quote))
            escaped += int(np.count_nonzero(is_quote[1:] & (found[:-1] == 0x5C)))
    # A string has two quotes without a backslash before them, or one where it ends in a backslash itself.
    return Parts(commas + colons + lists + objects + 1, (quotes - escaped + 1) // 2, lists, objects, colons)


def shown(value: Any) -> str:
    """A value from outside for an error message, cut to a few words, whatever its size."""
    return _SHORT.repr(value)


def _excess(found: Parts) -> tuple[str, int, int] | None:
    for name, has, may in zip(Parts._fields, found, MOST, strict=True):
        if has > may:
            return name, has, may
    return None


def _outside_strings(raw: bytes) -> list[bytes]:
    """Return what stands between the strings of a JSON text; of broken JSON, any part of it."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return plain.split(b'"')[::2]


def _with_infinities(raw: bytes, error: ValueError, what: str, found: Parts | None) -> Any:
    if b"NaN" in raw or b"Infinity" in raw:
        if found is not None and found.values > MAX_VALUES_WITH_NAN:
            raise PayloadTooLarge(
                f"{what} has {found.values} values and is not plain JSON ({error}); with NaN or Infinity "
                f"at most {MAX_VALUES_WITH_NAN} are decoded: send large tensors as binary data"
            )
        try:
            decoded = json.loads(raw)
            # What orjson does not write, as half a surrogate pair, is no JSON for any other part.
            orjson.dumps(decoded)
            return decoded
        except (ValueError, TypeError, RecursionError):
            pass
    raise BadRequest(f"{what} is not JSON: {plain(error)}")


def plain(error: ValueError | str) -> str:
    """Return what a JSON decoder found, in words that do not speak of the decoder."""
    told = str(error)
    for found, words in _WORDS.items():
        if found in told.lower():
            return words + told[at:] if (at := told.find(": line ")) > 0 else words
    return told


# "allocate memory" is what orjson says of lists that are nested too deeply and not closed.
_DEEP = "it nests lists or objects more than 1,024 deep"
_WORDS = {
    "depth limit": _DEEP,
    "recursion": _DEEP,
    "allocate memory": _DEEP,
    "zero-length": "it is empty",
    "parsed as double": "a number is larger than 64-bit floating point takes",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxdict = _SHORT.maxlist = 6
