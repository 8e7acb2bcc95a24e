"""Read the header of a GGUF file: its metadata, and the size that the whole file must have. Pure.

Source of the layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

MAGIC = b"GGUF"
# The most tokens of a prompt and its answer together, if the Deployment does not set the context. Models
# allow up to a million tokens, which would need too much memory.
DEFAULT_CONTEXT = 8192
# The number of tokens in the KV cache for each engine slot, if the Deployment does not set the context. The
# whole cache always has room for at least one full context.
DEFAULT_SLOT_TOKENS = 2048
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
# Arrays with more values than this are not stored, because vocabularies have hundreds of thousands of values.
_KEPT_ARRAY = 64
_MAX_COUNT, _MAX_DIMS = 2**24, 8
# The size of one block of a tensor: (number of elements, number of bytes). The keys are ggml's numbers of the
# tensor types.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip


class NotGguf(ValueError):
    """An error: the bytes are not a complete GGUF header. The message says why."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata of a GGUF file. ``size``: a complete file has at least this many bytes."""

    metadata: dict[str, Any]
    size: int

    @property
    def architecture(self) -> str:
        """Return the name of the architecture, such as ``llama``; empty if it is not stated."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str, default: int = 0) -> int:
        """Return a number from the architecture's metadata, such as ``context_length``.

        If the metadata has one value for each layer, return the largest. If there is no number, return
        ``default`` or 0.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):  # one value for each layer
            value = max(value, default=default)
        return int(value) if isinstance(value, int | float) else default


def kv_bytes_per_token(header: GgufHeader) -> int:
    """Return how many bytes a token takes in the KV cache with 16 bits per value; 0 if not known."""
    heads = header.number("attention.head_count")
    width = header.number("embedding_length") // heads if heads else 0
    kv_heads = header.number("attention.head_count_kv", heads)
    key = header.number("attention.key_length", width)
    value = header.number("attention.value_length", width)
    return 2 * header.number("block_count") * kv_heads * (key + value)


def context_of(header: GgufHeader | None, stated: int | None) -> int:
    """Return the most tokens of a prompt and its answer together.

    This is ``stated``. If ``stated`` is None, it is the model's own limit, but at most ``DEFAULT_CONTEXT``.
    """
    trained = header.number("context_length") if header else 0
    return stated or min(trained or DEFAULT_CONTEXT, DEFAULT_CONTEXT)


def kv_tokens_of(context: int, slots: int, *, stated: bool) -> int:
    """Return the default size of the KV cache in tokens.

    ``stated``: True if the Deployment sets ``context``.
    """
    return slots * context if stated else max(context, slots * min(context, DEFAULT_SLOT_TOKENS))


def read(data: bytes | memoryview) -> GgufHeader:
    """Read the header of a GGUF file. Raise :class:`NotGguf` if the header is cut off or broken.

    ``data``: the bytes from the start of the file, or a memory map of the whole file.
    """
    try:
        return _read(_Reader(data))
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise NotGguf(f"the header of the file is cut off or broken ({error})") from None


def _read(reader: _Reader) -> GgufHeader:
    if reader.take(4) != MAGIC:
        raise NotGguf("the file does not begin with GGUF")
    version = reader.scalar("<I")
    if version not in (2, 3):
        raise NotGguf(f"the file has version {version} of the format, but only 2 and 3 are supported")
    tensors, pairs = reader.count(), reader.count()
    metadata = {}
    for _ in range(pairs):
        key = reader.text()
        metadata[key] = reader.value(reader.scalar("<I"))
    ends = [_tensor_end(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise NotGguf(f"the file states the alignment {alignment!r}; expected 1 to 1,048,576")
    start = -(-reader.at // alignment) * alignment
    return GgufHeader(metadata, start + max(ends, default=0))


def _tensor_end(reader: _Reader) -> int:
    """Return the offset of the end of a tensor's data, relative to the start of all tensors' data."""
    reader.text()
    dims = reader.scalar("<I")
    if dims > _MAX_DIMS:
        raise NotGguf(f"a tensor has {dims} dimensions; the limit is {_MAX_DIMS}")
    elements = 1
    for _ in range(dims):
        elements *= reader.scalar("<Q")
    kind, offset = reader.scalar("<I"), reader.scalar("<Q")
    block, size = _BLOCKS.get(kind, (1, 0))  # for an unknown type, count no bytes after the offset
    return int(offset) + elements // block * size


class _Reader:
    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.at:
            raise NotGguf("the header of the file is cut off")
        self.at += count
        return bytes(self._data[self.at - count : self.at])

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self) -> int:
        found = int(self.scalar("<Q"))
        if found > _MAX_COUNT:
            raise NotGguf(f"the GGUF header states {found} entries or bytes; the limit is {_MAX_COUNT}")
        return found

    def text(self) -> str:
        return self.take(self.count()).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise NotGguf(f"the header of the file has a value of the unknown type {kind}")
            return self.scalar(_SCALARS[kind])
        inner, count = self.scalar("<I"), self.count()
        if inner in _SCALARS and count > _KEPT_ARRAY:
            self.take(count * struct.calcsize(_SCALARS[inner]))
            return None
        found = [self.value(inner) for _ in range(count)]
        return found if count <= _KEPT_ARRAY else None
