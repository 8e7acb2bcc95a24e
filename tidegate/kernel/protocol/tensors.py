"""Datatypes of the Open Inference Protocol, and conversion between raw bytes and JSON values.

Raw bytes are little-endian and row-major. A BYTES element is a 32-bit length, followed by that number of
bytes, as in the protocol's binary data extension. The conversion of a numeric tensor uses no Python loop over
the elements, because such a loop would be slow.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.bounded_json import shown


@dataclass(frozen=True, slots=True)
class Datatype:
    """A datatype of tensors.

    ``code``: its code in frames. ``size``: the number of bytes of an element; 0 if elements differ in size.
    ``array_code``, ``numpy``: the datatype's names in Python's ``array`` and in numpy. A name is empty if
    that library has no such type.
    """

    name: str
    code: int
    size: int
    array_code: str
    numpy: str


DATATYPES: dict[str, Datatype] = {
    d.name: d
    for d in (
        Datatype("BOOL", 1, 1, "b", "?"),
        Datatype("UINT8", 2, 1, "B", "<u1"),
        Datatype("UINT16", 3, 2, "H", "<u2"),
        Datatype("UINT32", 4, 4, "I", "<u4"),
        Datatype("UINT64", 5, 8, "Q", "<u8"),
        Datatype("INT8", 6, 1, "b", "<i1"),
        Datatype("INT16", 7, 2, "h", "<i2"),
        Datatype("INT32", 8, 4, "i", "<i4"),
        Datatype("INT64", 9, 8, "q", "<i8"),
        Datatype("FP16", 10, 2, "", "<f2"),
        Datatype("FP32", 11, 4, "f", "<f4"),
        Datatype("FP64", 12, 8, "d", "<f8"),
        Datatype("BYTES", 13, 0, "", ""),
        Datatype("BF16", 14, 2, "", ""),
    )
}
BY_CODE: dict[int, Datatype] = {d.code: d for d in DATATYPES.values()}

_LENGTH = struct.Struct("<I")
# The search for a wrong value checks slices of this many values, because checking a whole slice is faster.
# Then it checks each value of the wrong slice.
_SLICE = 1024
# The maximum number of strings in a tensor. Strings need a loop over the elements. For this number of
# strings, the loop blocks the event loop for 0.1 s.
MAX_STRINGS = 2**20

# These types of 16 bits are not accepted as JSON, as in Triton. They need the binary data extension.
BINARY_ONLY = {"FP16", "BF16"}


def elements(shape: list[int]) -> int:
    """Return the number of elements of a tensor of ``shape``; 1 for a scalar."""
    return prod(shape)


def from_json(name: str, datatype: Datatype, shape: list[int], data: list[Any]) -> bytes:
    """Return flat or nested JSON values as raw bytes.

    Raises BadRequest if ``data`` does not fit the shape or the datatype, and always for FP16 and BF16.
    ``name``: the tensor's name, for this error.
    """
    if datatype.name in BINARY_ONLY:
        raise BadRequest(
            f"input {name!r}: {datatype.name} cannot be sent as JSON; use the binary data extension"
        )
    flat = _flatten(name, data)
    expected = elements(shape)
    if len(flat) != expected:
        raise BadRequest(f"input {name!r}: shape {shape} needs {expected} elements, got {len(flat)}")
    try:
        if datatype.name == "BYTES":
            check_count(name, expected)
            return pack_strings(flat)
        raw = array(datatype.array_code, flat).tobytes()
        if datatype.name == "BOOL" and raw.translate(None, b"\0\1"):
            raise TypeError
        return raw
    except (TypeError, OverflowError, UnicodeEncodeError, struct.error):
        raise misfit(name, datatype, flat) from None


def misfit(name: str, datatype: Datatype, values: list[Any]) -> BadRequest:
    """Return a BadRequest that names the wrong value among ``values`` and says what ``datatype`` accepts."""
    return BadRequest(f"input {name!r}: data is not {datatype.name}: {_misfit(datatype, values)}")


def _misfit(datatype: Datatype, values: list[Any]) -> str:
    for begin in range(0, len(values), _SLICE):
        some = values[begin : begin + _SLICE]
        if _fit(datatype, some):
            continue
        at = next(at for at, value in enumerate(some) if not _fit(datatype, [value]))
        wrong = "null" if some[at] is None else shown(some[at])
        return f"element {begin + at} is {wrong}; {datatype.name} accepts {_takes(datatype)}"
    return f"{datatype.name} accepts {_takes(datatype)}"


def _fit(datatype: Datatype, values: list[Any]) -> bool:
    try:
        strings = datatype.name == "BYTES"
        raw = pack_strings(values) if strings else array(datatype.array_code, values).tobytes()
    except (TypeError, OverflowError, UnicodeEncodeError, struct.error):
        return False
    return datatype.name != "BOOL" or not raw.translate(None, b"\0\1")


def _takes(datatype: Datatype) -> str:
    bits = 8 * datatype.size
    match datatype.numpy[1:2]:
        case "u":
            return f"whole numbers from 0 to {2**bits - 1}"
        case "i":
            return f"whole numbers from {-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1}"
        case "f":
            return "numbers"
    return "true and false" if datatype.name == "BOOL" else "strings"


def check_count(name: str, strings: int) -> None:
    """Raise BadRequest if a BYTES input has too many elements."""
    if strings > MAX_STRINGS:
        raise BadRequest(f"input {name!r}: {strings} elements of BYTES; the limit is {MAX_STRINGS}")


def _flatten(name: str, data: list[Any]) -> list[Any]:
    while data and isinstance(data[0], list):
        if set(map(type, data)) != {list}:
            raise BadRequest(f"input {name!r}: data mixes lists and values at one level")
        data = list(chain.from_iterable(data))
    return data


def to_json(datatype: Datatype, raw: bytes | memoryview) -> Any:
    """Return a tensor's raw bytes as values that orjson can write.

    For BYTES, return a flat list of strings. If a string is not UTF-8, return None, because JSON cannot carry
    it. For all other datatypes, return a numpy array, which needs orjson's option OPT_SERIALIZE_NUMPY.
    """
    if datatype.name == "BYTES":
        try:
            return [element.decode() for element in unpack_strings(raw)]
        except UnicodeDecodeError:
            return None
    # Import numpy only here. Workers do not need numpy, and the import would take a fifth of their start
    # time.
    import numpy as np

    if datatype.name == "BF16":
        return np.frombuffer(raw, "<u2").astype("<u4").__lshift__(16).view("<f4")
    return np.frombuffer(raw, datatype.numpy)


def pack_strings(values: list[Any]) -> bytes:
    """Return strings (or bytes) in the layout of BYTES tensors."""
    kinds = set(map(type, values))
    if wrong := kinds - {str, bytes}:
        raise TypeError(f"expected a string, got {min(kind.__name__ for kind in wrong)}")
    raws = values if str not in kinds else [v.encode() if type(v) is str else v for v in values]
    return b"".join(chain.from_iterable(zip(map(_LENGTH.pack, map(len, raws)), raws, strict=True)))


def unpack_strings(raw: bytes | memoryview) -> list[bytes]:
    """Return the elements of a BYTES tensor. Raises ValueError if the bytes end inside an element."""
    view, at, found = memoryview(raw), 0, []
    while at < len(view):
        if at + 4 > len(view):
            raise ValueError("a BYTES element's length is cut off")
        (size,) = _LENGTH.unpack_from(view, at)
        at += 4
        if at + size > len(view):
            raise ValueError(f"a BYTES element of {size} bytes is cut off")
        found.append(bytes(view[at : at + size]))
        at += size
    return found


def string_offsets(raw: bytes | memoryview, every: int) -> list[int]:
    """Return byte offsets in a BYTES tensor: the end of each group of ``every`` elements.

    An incomplete last group has no offset. Raises ValueError or struct.error if the bytes end inside an
    element.
    """
    at, count, found = 0, 0, []
    while at < len(raw):
        (size,) = _LENGTH.unpack_from(raw, at)
        at += 4 + size
        count += 1
        if count % every == 0:
            found.append(at)
    if at != len(raw):
        raise ValueError("a BYTES element is cut off")
    return found


def count_strings(raw: bytes | memoryview) -> int:
    """Count the elements of a BYTES tensor, up to ``MAX_STRINGS + 1``.

    Raises ValueError if the bytes end inside an element.
    """
    at, count, end = 0, 0, len(raw)
    try:
        while at < end and count <= MAX_STRINGS:
            at += 4 + _LENGTH.unpack_from(raw, at)[0]
            count += 1
    except struct.error:
        raise ValueError(
            f"the length of element {count} is cut off: {at + 4 - end} of its 4 bytes are missing"
        ) from None
    if at != end and count <= MAX_STRINGS:
        raise ValueError(f"element {count - 1} is cut off: {at - end} bytes are missing")
    return count
