"""JSON values <-> raw bytes, for every datatype."""

from __future__ import annotations

import struct

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import tensors
from tidegate.kernel.protocol.tensors import (
    BY_CODE,
    DATATYPES,
    count_strings,
    elements,
    from_json,
    pack_strings,
    string_offsets,
    to_json,
    unpack_strings,
)

pytestmark = pytest.mark.unit

INTEGERS = {
    "UINT8": (0, 2**8 - 1),
    "UINT16": (0, 2**16 - 1),
    "UINT32": (0, 2**32 - 1),
    "UINT64": (0, 2**64 - 1),
    "INT8": (-(2**7), 2**7 - 1),
    "INT16": (-(2**15), 2**15 - 1),
    "INT32": (-(2**31), 2**31 - 1),
    "INT64": (-(2**63), 2**63 - 1),
}
VALUES = {
    "BOOL": st.booleans(),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    "BYTES": st.text(st.characters(codec="utf-8")),
} | {name: st.integers(*limits) for name, limits in INTEGERS.items()}


def encode(datatype: str, data: list, shape: list[int] | None = None) -> bytes:
    return from_json("x", DATATYPES[datatype], [len(data)] if shape is None else shape, data)


def decode(datatype: str, raw: bytes) -> list:
    """As a client sees it, after JSON."""
    found: list = orjson.loads(
        orjson.dumps(to_json(DATATYPES[datatype], raw), option=orjson.OPT_SERIALIZE_NUMPY)
    )
    return found


def test_the_codes_are_one_to_one():
    assert len(BY_CODE) == len(DATATYPES) == 14
    assert all(BY_CODE[d.code] is d for d in DATATYPES.values())


@pytest.mark.parametrize("datatype", VALUES)
@given(data=st.data())
def test_round_trip(datatype, data):
    values = data.draw(st.lists(VALUES[datatype], max_size=12))
    raw = encode(datatype, values)
    if size := DATATYPES[datatype].size:
        assert len(raw) == size * len(values)
    shown = decode(datatype, raw)
    if datatype == "FP32":  # shown as the shortest decimal that is the same FP32
        shown = [float(np.float32(value)) for value in shown]
    assert shown == values


@pytest.mark.parametrize("datatype", [d for d in DATATYPES.values() if d.numpy], ids=lambda d: d.name)
def test_the_layout_is_little_endian(datatype):
    values = [1, 0, 1]
    expected = np.array(values, datatype.numpy).tobytes()
    if datatype.array_code:
        assert (
            encode(datatype.name, [bool(v) for v in values] if datatype.name == "BOOL" else values)
            == expected
        )
    assert [float(v) for v in to_json(datatype, expected)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 3], [1, 2, 3, 4, 5, 6]),
        ([2, 3], [[1, 2, 3], [4, 5, 6]]),
        ([1, 2, 3], [[[1, 2, 3], [4, 5, 6]]]),
        ([6], [[[[1, 2], [3, 4], [5, 6]]]]),
    ],
)
def test_nested_and_flat_are_the_same(shape, data):
    assert encode("INT32", data, shape) == struct.pack("<6i", 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize(("shape", "data"), [([0], []), ([2, 0], [[], []]), ([0, 3], [])])
def test_empty(datatype, shape, data):
    assert encode(datatype, data, shape) == b""
    assert decode(datatype, b"") == []


def test_scalar():
    assert elements([]) == 1
    assert encode("FP32", [2.5], []) == struct.pack("<f", 2.5)


@pytest.mark.parametrize("datatype", INTEGERS)
def test_limits_of_integers(datatype):
    low, high = INTEGERS[datatype]
    assert decode(datatype, encode(datatype, [low, high])) == [low, high]
    for value in (low - 1, high + 1):
        with pytest.raises(BadRequest, match=f"input 'x': data is not {datatype}: "):
            encode(datatype, [value])


@pytest.mark.parametrize("value", ["1", None, {}, 1.5, b"1"])
@pytest.mark.parametrize("datatype", INTEGERS)
def test_what_is_no_integer(datatype, value):
    with pytest.raises(BadRequest, match=f"input 'x': data is not {datatype}: "):
        encode(datatype, [1, value])


@pytest.mark.parametrize("value", ["1", None, {}, b"1"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "BOOL"])
def test_what_is_no_number(datatype, value):
    with pytest.raises(BadRequest, match=f"input 'x': data is not {datatype}: "):
        encode(datatype, [1, value])


@pytest.mark.parametrize("value", [2, -1, 127, 128])
def test_what_is_neither_true_nor_false(value):
    with pytest.raises(BadRequest, match="data is not BOOL"):
        encode("BOOL", [value])


@pytest.mark.parametrize("value", [1, None, True, 1.5, {}, ["a"]])
def test_what_is_no_string(value):
    with pytest.raises(BadRequest, match="data is not BYTES: element 1 is "):
        encode("BYTES", ["a", value])


@pytest.mark.parametrize(
    ("datatype", "values", "told"),
    [
        (
            "INT64",
            [1, 2**63],
            f"element 1 is 9223372036854775808; INT64 accepts whole numbers from {-(2**63)} to",
        ),
        ("INT64", [10**20 * 1.0], "element 0 is 1e+20; INT64 accepts whole numbers from"),
        ("UINT8", [0] * 5000 + [256, 300], "element 5000 is 256; UINT8 accepts whole numbers from 0 to 255"),
        ("FP32", [1.5, None], "element 1 is null; FP32 accepts numbers"),
        ("BOOL", [True, 2], "element 1 is 2; BOOL accepts true and false"),
        ("BYTES", ["a", "\ud800"], "element 1 is '\\ud800'; BYTES accepts strings"),
    ],
)
def test_what_does_not_fit_is_named(datatype, values, told):
    """In the protocol's words, not in those of a library."""
    with pytest.raises(BadRequest) as caught:
        encode(datatype, values)
    assert caught.value.message.startswith(f"input 'x': data is not {datatype}: {told}")


def test_integers_are_floats_too():
    assert decode("FP64", encode("FP64", [1, -2])) == [1.0, -2.0]
    with pytest.raises(BadRequest, match="data is not FP64"):
        encode("FP64", [10**400])


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_narrow_floats_come_as_binary_only(datatype):
    with pytest.raises(BadRequest, match=f"{datatype} cannot be sent as JSON; use the binary data extension"):
        encode(datatype, [1.0])


def test_narrow_floats_are_shown():
    raw = np.array([1.5, -2.0], "<f4").view("<u4").__rshift__(16).astype("<u2").tobytes()
    assert decode("BF16", raw) == [1.5, -2.0]
    assert list(to_json(DATATYPES["FP16"], np.array([0.5], "<f2").tobytes())) == [0.5]


def test_not_a_number_has_no_json():
    raw = np.array([np.nan, np.inf, -np.inf, 1.0], "<f4").tobytes()
    assert decode("FP32", raw) == [None, None, None, 1.0]


@pytest.mark.parametrize(
    ("shape", "data", "found"), [([2], [1], 1), ([2, 2], [[1, 2], [3]], 3), ([], [], 0), ([0], [1], 1)]
)
def test_count_and_shape_disagree(shape, data, found):
    expected = elements(shape)
    with pytest.raises(BadRequest) as caught:
        encode("INT32", data, shape)
    assert caught.value.message == f"input 'x': shape {shape} needs {expected} elements, got {found}"


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT32", [[1], 2]),
        ("INT32", [1, [2]]),
        ("INT32", [[[1]], [2]]),
        ("BYTES", [["ab"], "cd", "e"]),
        ("BYTES", ["ab", ["cd"]]),
        ("BYTES", [["ab"], {"c": 1}]),
    ],
)
def test_lists_and_values_at_one_level(datatype, data):
    """A string is a list of characters to Python, but not to a caller."""
    for shape in ([2], [3], [4]):
        with pytest.raises(BadRequest, match="input 'x'"):
            encode(datatype, data, shape)


@pytest.mark.parametrize("text", ["", "ascii", "größe", "漢字", "👋🏽", "\0", "a\nb"])
def test_unicode_strings(text):
    raw = encode("BYTES", [text])
    assert raw == struct.pack("<I", len(text.encode())) + text.encode()
    assert decode("BYTES", raw) == [text]


def test_a_lone_surrogate_is_no_string():
    with pytest.raises(BadRequest, match="data is not BYTES"):
        encode("BYTES", ["\ud800"])


@given(st.lists(st.binary(max_size=20)))
def test_strings_of_any_bytes(values):
    assert unpack_strings(pack_strings(values)) == values


@given(st.lists(st.binary(max_size=9), min_size=1), st.integers(1, 4))
def test_offsets_are_where_the_runs_end(values, every):
    raw = pack_strings(values)
    found = string_offsets(raw, every)
    assert len(found) == len(values) // every
    for run, end in enumerate(found, 1):
        assert unpack_strings(raw[:end]) == values[: run * every]


@given(st.binary(max_size=40))
def test_any_bytes_are_strings_or_an_error(raw):
    try:
        assert pack_strings(unpack_strings(raw)) == raw
    except ValueError:
        with pytest.raises((ValueError, struct.error)):
            string_offsets(raw, 1)


@pytest.mark.parametrize(
    ("raw", "message"), [(b"\1\0\0", "length is cut off"), (b"\2\0\0\0a", "of 2 bytes is cut off")]
)
def test_cut_off_strings(raw, message):
    with pytest.raises(ValueError, match=message):
        unpack_strings(raw)


def test_no_more_strings_than_may_be(monkeypatch):
    """They are gone over one by one, while nothing else is done."""
    monkeypatch.setattr(tensors, "MAX_STRINGS", 3)
    assert len(encode("BYTES", ["a"] * 3)) == 15
    with pytest.raises(BadRequest, match="input 'x': 4 elements of BYTES; the limit is 3"):
        encode("BYTES", ["a"] * 4)
    assert [count_strings(pack_strings(["a"] * count)) for count in (0, 3, 4, 5, 900)] == [0, 3, 4, 4, 4]
    with pytest.raises(ValueError, match="cut off"):
        count_strings(pack_strings(["a"])[:-1])


def test_strings_and_bytes_side_by_side():
    assert unpack_strings(pack_strings(["ö", b"\xff", ""])) == ["ö".encode(), b"\xff", b""]
    with pytest.raises(TypeError, match="expected a string, got NoneType"):
        pack_strings(["a", None])
