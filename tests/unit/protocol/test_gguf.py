"""The header of a GGUF file: metadata, the size of the file, and broken files."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.kernel.protocol import gguf

pytestmark = pytest.mark.unit

U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return pair(key, U32, struct.pack("<I", value))


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", dim) for dim in dims)
    return head + struct.pack("<IQ", kind, offset)


def header(pairs: list[bytes], tensors: list[bytes], version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(pairs))
    return gguf.MAGIC + counts + b"".join(pairs) + b"".join(tensors)


LLAMA = [
    pair("general.architecture", STRING, text("llama")),
    number("llama.context_length", 8192), number("llama.block_count", 30),
    number("llama.embedding_length", 576), number("llama.attention.head_count", 9),
    number("llama.attention.head_count_kv", 3),
]  # fmt: skip


def test_metadata_and_memory_of_a_token():
    found = gguf.read(header(LLAMA, []))
    assert (found.architecture, found.number("context_length"), found.number("nothing", 7)) == (
        "llama",
        8192,
        7,
    )
    # 30 layers, 3 heads of 64 for keys and for values, 2 bytes each.
    assert gguf.kv_bytes_per_token(found) == 30 * 3 * (64 + 64) * 2
    assert gguf.kv_bytes_per_token(gguf.read(header([], []))) == 0


@pytest.mark.parametrize(
    ("kind", "elements", "expected"), [(0, 8, 32), (1, 8, 16), (8, 64, 68), (12, 512, 288)]
)
def test_size_ends_with_the_last_tensor(kind: int, elements: int, expected: int):
    tensors = [tensor("b", [elements], kind, 320), tensor("a", [4], 0, 0)]
    whole = header(LLAMA, tensors)
    start = -(-len(whole) // 32) * 32
    assert gguf.read(whole).size == start + 320 + expected


def test_long_arrays_are_skipped_and_short_ones_are_kept():
    floats = struct.pack("<IQ", F32, 100) + b"\0" * 400
    words = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
    found = gguf.read(header([pair("long", ARRAY, floats), pair("short", ARRAY, words)], []))
    assert found.metadata == {"long": None, "short": ["a", "b"]}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GGML" + b"\0" * 40, "does not begin"),
        (header(LLAMA, [], version=9), "version 9"),
        (header(LLAMA, [])[:-3], "cut off"),
        (gguf.MAGIC + struct.pack("<IQQ", 3, 2**60, 0), "entries"),
        (header([pair("x", 99, b"")], []), "unknown type 99"),
        (header([], [tensor("t", [1] * 9, 0, 0)]), "9 dimensions"),
    ],
)
def test_a_broken_header_says_why(data: bytes, says: str):
    with pytest.raises(gguf.NotGguf, match=says):
        gguf.read(data)


@given(st.binary(max_size=200), st.integers(0, 200))
@settings(max_examples=200)
def test_any_bytes_are_read_or_refused(noise: bytes, at: int):
    whole = header(LLAMA, [tensor("t", [8], 0, 0)])
    try:
        gguf.read(whole[:at] + noise + whole[at + len(noise) :])
    except gguf.NotGguf:
        pass
