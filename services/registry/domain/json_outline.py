"""Read a few values of a large JSON or UBJSON document without loading the others into memory. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

Path = tuple[str, ...]
MAX_DEPTH = 64
MAX_OBJECTS_DEPTH = 1000
MAX_PARTS = 20_000_000
MAX_VALUE = 4 * 1024 * 1024
"""The most bytes of one value that is read."""

# This pattern matches a bracket or a string. If the string is a key, the match includes the colon. A string
# without a closing quote matches up to the end of the data. If it did not match, the search in a damaged file
# would take quadratic time.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"(\s*+:)?|\\?\Z)|[{}\[\]]', re.DOTALL)
_MAX_KEY = 256


class Malformed(Exception):
    """The document is malformed, too deep or too large. The message says which."""


def pick_json(data: mmap | bytes, wanted: Collection[Path]) -> dict[Path, Any]:
    """Return the values at these paths of a JSON document. Absent paths are left out.

    A path is a tuple of keys, such as ``("learner", "objective")``. A path must lead to a string, an array or
    an object. Outside the values at these paths, only the brackets are checked.
    """
    return _Outline(frozenset(wanted)).read(data)


def objects(data: mmap | bytes, keys: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield one dict for each object in a JSON document, with the text values of these keys.

    Also yield an empty dict for each array. A value that is not a text becomes None. If a key occurs twice in
    an object, the last value is used.

    Raise Malformed if the document is malformed, too deep or too large.
    """
    frames: list[tuple[bytes, dict[str, Any]]] = []
    key = ""
    for count, token in enumerate(_TOKEN.finditer(data)):
        first = data[token.start() : token.start() + 1]
        if count > MAX_PARTS or len(frames) > MAX_OBJECTS_DEPTH:
            raise Malformed(
                f"the file has more than {MAX_PARTS} parts, or more than {MAX_OBJECTS_DEPTH} levels"
            )
        if first == b'"' and token[1] is not None:
            short = token.start(1) - token.start() < _MAX_KEY
            key = str(_loaded(data[token.start() : token.start(1)])) if short else ""
            if frames and key in keys:
                frames[-1][1][key] = None
        elif first == b'"':
            if token.end() == len(data):
                raise Malformed("the file ends inside a text, so the copy may be broken")
            if frames and key in keys:
                frames[-1][1][key] = _loaded(_value(data, token.start(), token.end()))
            key = ""
        elif first in (b"{", b"["):
            frames.append((first, {}))
            key = ""
        else:
            if not frames or (frames[-1][0] == b"{") != (first == b"}"):
                raise Malformed("the brackets in the file do not match")
            yield frames.pop()[1]
    if frames:
        raise Malformed("the file ends too early, so the copy may be broken")


@dataclass
class _Outline:
    wanted: frozenset[Path]
    found: dict[Path, Any] = field(default_factory=dict)
    # One key for each bracket that is still open: the key whose value begins with the bracket. The key is
    # empty if the bracket is an element of an array.
    open: list[str] = field(default_factory=list)
    kinds: list[bytes] = field(default_factory=list)
    key: str = ""
    begin: int = 0
    inside: int = 0  # depth of the wanted value that is being read; 0: none

    def read(self, data: mmap | bytes) -> dict[Path, Any]:
        for count, token in enumerate(_TOKEN.finditer(data)):
            if count > MAX_PARTS:
                raise Malformed(f"the file has more than {MAX_PARTS} parts")
            first = data[token.start() : token.start() + 1]
            if first == b'"':
                self._string(data, token)
            elif first in (b"{", b"["):
                self._opened(first, token.start())
            else:
                self._closed(data, first, token.end())
                if not self.open:
                    _check_rest(data, token.end())
                    return self.found
        raise Malformed("the file ends too early, so the copy may be broken")

    def _path(self) -> Path:
        return (*self.open[1:], self.key)

    def _string(self, data: mmap | bytes, token: re.Match[bytes]) -> None:
        if token.end() == len(data):
            raise Malformed("the file ends inside a text, so the copy may be broken")
        if token[1] is not None:
            # All wanted keys are shorter than _MAX_KEY bytes. So a longer key is not decoded.
            short = token.start(1) - token.start() < _MAX_KEY
            self.key = str(_loaded(data[token.start() : token.start(1)])) if short else ""
            return
        if not self.inside and self.kinds[-1:] == [b"{"] and self._path() in self.wanted:
            self.found[self._path()] = _loaded(_value(data, token.start(), token.end()))
        self.key = ""

    def _opened(self, bracket: bytes, at: int) -> None:
        if len(self.open) >= MAX_DEPTH:
            raise Malformed(f"the file is nested more than {MAX_DEPTH} levels deep")
        self.open.append(self.key)
        self.kinds.append(bracket)
        if not self.inside and tuple(self.open[1:]) in self.wanted:
            self.begin, self.inside = at, len(self.open)
        self.key = ""

    def _closed(self, data: mmap | bytes, bracket: bytes, end: int) -> None:
        if not self.kinds or (self.kinds[-1] == b"{") != (bracket == b"}"):
            raise Malformed("the brackets in the file do not match")
        if self.inside == len(self.open):
            self.found[tuple(self.open[1:])] = _loaded(_value(data, self.begin, end))
            self.inside = 0
        self.open.pop()
        self.kinds.pop()
        self.key = ""


def _check_rest(data: mmap | bytes, end: int) -> None:
    if data[end : end + 1024].strip(b" \r\n\t\0"):
        raise Malformed("more data follow after the end of the model")


def _value(data: mmap | bytes, begin: int, end: int) -> bytes:
    if end - begin > MAX_VALUE:
        raise Malformed(f"a value in the file has more than {MAX_VALUE} bytes")
    return data[begin:end]


def _loaded(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the file is not JSON: {error}") from None


_WIDTHS = {
    b"Z": 0, b"T": 0, b"F": 0, b"N": 0, b"i": 1, b"U": 1, b"C": 1, b"I": 2, b"l": 4, b"d": 4, b"L": 8,
    b"D": 8,
}  # fmt: skip
_WHOLE = b"iUIlL"
_VALUE_BYTES = 32


def pick_ubj(data: mmap | bytes, wanted: Collection[Path]) -> dict[Path, Any]:
    """Return the values at these paths of a UBJSON document. Absent paths are left out."""
    reader = _Ubj(data, frozenset(wanted))
    reader.value(reader.take(1), (), 0, keep=False)
    return reader.found


class _Ubj:
    def __init__(self, data: mmap | bytes, wanted: frozenset[Path]) -> None:
        self.found: dict[Path, Any] = {}
        self._data, self._wanted = data, wanted
        self._at = self._parts = self._kept = 0

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes. Raise Malformed if there are fewer."""
        if not 0 <= count <= len(self._data) - self._at:
            raise Malformed("the file states a length beyond its end, so the copy may be broken")
        self._at += count
        return self._data[self._at - count : self._at]

    def _skip(self, count: int) -> None:
        if not 0 <= count <= len(self._data) - self._at:
            raise Malformed("the file states a length beyond its end, so the copy may be broken")
        self._at += count

    def _peek(self) -> bytes:
        return self._data[self._at : self._at + 1]

    def _whole(self, marker: bytes) -> int:
        if marker not in _WIDTHS or marker not in _WHOLE:
            raise Malformed(f"the file has {marker!r} where a whole number is expected")
        return int.from_bytes(self.take(_WIDTHS[marker]), "big", signed=marker != b"U")

    def _text(self, keep: bool) -> str:
        length = self._whole(self.take(1))
        if not keep and length > _MAX_KEY:
            self._skip(length)
            return ""
        return self._keep(self.take(length)).decode("utf-8", "replace")

    def _keep(self, data: bytes) -> bytes:
        self._kept += len(data)
        if len(data) > MAX_VALUE:
            raise Malformed(f"a value in the file has more than {MAX_VALUE} bytes")
        self._check_kept()
        return data

    def _keep_values(self, count: int) -> None:
        """Add the memory of ``count`` values to the counted memory. Even an empty value needs memory."""
        self._kept += _VALUE_BYTES * count
        self._check_kept()

    def _check_kept(self) -> None:
        if self._kept > 64 * MAX_VALUE:
            raise Malformed(
                f"the values to read from the file need more than {64 * MAX_VALUE} bytes of memory"
            )

    def value(self, marker: bytes, path: Path, depth: int, *, keep: bool) -> Any:
        """Read or skip one value, and store it if its path is wanted.

        ``marker``: the byte that states the value's type. ``keep``: True if the value is part of a wanted
        value.
        """
        self._parts += 1
        if self._parts > MAX_PARTS or depth > MAX_DEPTH:
            raise Malformed(f"the file has more than {MAX_PARTS} parts, or more than {MAX_DEPTH} levels")
        wanted = path in self._wanted
        keep = keep or wanted
        if keep:
            self._keep_values(1)
        if marker == b"{":
            found: Any = dict(self._fields(path, depth, keep))
        elif marker == b"[":
            found = self._elements(path, depth, keep)
        elif marker in (b"S", b"H"):
            found = self._text(keep)
        elif marker in _WIDTHS and marker:
            found = self._scalar(marker)
        else:
            raise Malformed(f"the file has {marker!r} where a value is expected")
        if wanted:
            self.found[path] = found
        return found if keep else None

    def _scalar(self, marker: bytes) -> Any:
        if marker in _WHOLE:
            return self._whole(marker)
        self._skip(_WIDTHS[marker])
        return {b"T": True, b"F": False}.get(marker)

    def _head(self) -> tuple[bytes, int | None]:
        """Return the type of a container's elements, and the number of elements.

        The file may omit the type, or both. An omitted type is returned as empty bytes, an omitted number as
        None.
        """
        kind, count = b"", None
        if self._peek() == b"$":
            self.take(1)
            kind = self.take(1)
        if self._peek() == b"#":
            self.take(1)
            count = self._whole(self.take(1))
        if (count is not None and count < 0) or (kind and count is None):
            raise Malformed("a container in the file does not state its number of elements")
        return kind, count

    def _numbers(self, count: int | None, end: bytes) -> Iterator[int]:
        done = 0
        while done != count if count is not None else self._peek() != end:
            yield done
            done += 1
        if count is None:
            self.take(1)

    def _fields(self, path: Path, depth: int, keep: bool) -> Iterator[tuple[str, Any]]:
        kind, count = self._head()
        for _ in self._numbers(count, b"}"):
            key = self._text(keep=False)
            found = self.value(kind or self.take(1), (*path, key), depth + 1, keep=keep)
            if keep:
                yield key, found

    def _elements(self, path: Path, depth: int, keep: bool) -> list[Any]:
        kind, count = self._head()
        if count is not None and kind in _WIDTHS and kind:
            if keep and count <= MAX_VALUE // 8:
                self._keep_values(count)
                return [self._scalar(kind) for _ in range(count)]
            self._skip(count * _WIDTHS[kind])
            return []
        inner = (*path, "")
        values = (
            self.value(kind or self.take(1), inner, depth + 1, keep=keep) for _ in self._numbers(count, b"]")
        )
        if keep:
            return list(values)
        for _ in values:
            pass
        return []
