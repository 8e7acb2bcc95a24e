"""Decode untrusted JSON within limits of memory and time.

Python values can take 35 times the memory of their JSON: ``[],`` has 3 bytes and becomes a list of 88 bytes.
While JSON is decoded, the process does nothing else. So the parts of a large text are counted first, and a
text with too many parts is refused. Counting takes a few percent of the time of decoding.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from tidegate.kernel.errors import BadRequest, PayloadTooLarge

Buffer = bytes | memoryview

# Decoding a text below this size takes at most 10 MB and 20 ms, so its parts are not counted.
COUNTED_FROM = 256 * 1024
# The most values of a text with NaN or Infinity. The limit is low, because only the standard library decodes
# such texts, and it is five times slower than orjson.
MAX_VALUES_WITH_NAN = 2**21
# Punctuation inside of strings makes the first count too high. If this count exceeds a limit and the text has
# at most this many strings, the text is counted again without the strings' content. This is cheap.
FEW_STRINGS = 2**16
_SLICE = 2**20


class JsonParts(NamedTuple):
    """The numbers of parts in a JSON text, by kind."""

    values: int
    strings: int
    lists: int
    objects: int
    members: int


# A text within these limits takes at most 500 MiB and 0.6 s of CPU. For example, a text with 2**23 numbers
# takes 480 MiB and 0.3 s.
MOST = JsonParts(values=2**23, strings=2**20 + 2**16, lists=2**19, objects=2**17, members=2**18)


def loads(raw: Buffer, what: str = "the request") -> Any:
    """Decode a JSON text. Raises BadRequest if it is invalid, PayloadTooLarge if it has too many parts.

    ``NaN`` and ``Infinity`` are accepted. They are not valid JSON, but Triton and its clients write them.
    """
    found = check(raw, what)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return _with_infinities(bytes(raw), error, what, found)


def check(raw: Buffer, what: str = "the request") -> JsonParts | None:
    """Return the numbers of parts in a JSON text. For a small text, return None without counting.

    Raises PayloadTooLarge if there are too many parts.
    """
    if len(raw) <= COUNTED_FROM:
        return None
    found = count([raw])
    if _excess(found) and found.strings <= FEW_STRINGS:
        found = count(_outside_strings(bytes(raw)))
    if excess := _excess(found):
        name, has, may = excess
        raise PayloadTooLarge(
            f"the JSON of {what} has {has} {name}; the limit is {may}: send large tensors as binary data"
        )
    return found


def count(pieces: Sequence[Buffer]) -> JsonParts:
    """Count the parts of a JSON text by its punctuation, including punctuation inside of strings."""
    import numpy as np  # slow to import, and workers do not need it

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
    # Each string has two quotes that are not escaped. If a string ends in a backslash, its end quote is
    # counted as escaped by mistake. So round up.
    return JsonParts(
        commas + colons + lists + objects + 1, (quotes - escaped + 1) // 2, lists, objects, colons
    )


def shown(value: Any) -> str:
    """Return a caller's value for an error message, cut to a few words."""
    return _SHORT.repr(value)


def _excess(found: JsonParts) -> tuple[str, int, int] | None:
    for name, has, may in zip(JsonParts._fields, found, MOST, strict=True):
        if has > may:
            return name, has, may
    return None


def _outside_strings(raw: bytes) -> list[bytes]:
    """Return the parts of a JSON text outside of its strings. For invalid JSON the result is meaningless."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    return plain.split(b'"')[::2]


def _with_infinities(raw: bytes, error: ValueError, what: str, found: JsonParts | None) -> Any:
    if b"NaN" in raw or b"Infinity" in raw:
        if found is not None and found.values > MAX_VALUES_WITH_NAN:
            raise PayloadTooLarge(
                f"{what} has {found.values} values and is not plain JSON ({error}). "
                f"In JSON with NaN or Infinity at most {MAX_VALUES_WITH_NAN} values are accepted. "
                "Send large tensors as binary data"
            )
        try:
            decoded = json.loads(raw)
            # Refuse values that orjson cannot write, such as half a surrogate pair, because other services
            # cannot read them.
            orjson.dumps(decoded)
            return decoded
        except (ValueError, TypeError, RecursionError):
            pass
    raise BadRequest(f"{what} is not JSON: {plain(error)}")


def plain(error: ValueError | str) -> str:
    """Return a JSON decoder's error in words for a user."""
    text = str(error)
    for found, words in _WORDS.items():
        if found in text.lower():
            return words + text[at:] if (at := text.find(": line ")) > 0 else words
    return text


# orjson says "allocate memory" for lists that are nested too deeply and not closed.
_DEEP = "it nests lists or objects more than 1,024 levels deep"
_WORDS = {
    "depth limit": _DEEP,
    "recursion": _DEEP,
    "allocate memory": _DEEP,
    "zero-length": "it is empty",
    "parsed as double": "a number is too large for a 64-bit float",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxdict = _SHORT.maxlist = 6
