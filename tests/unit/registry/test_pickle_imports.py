"""What a pickle imports is found without executing it."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.domain import pickle_verdicts
from services.registry.domain.pickle_machine import Unscannable, imports
from tidegate.kernel.errors import BadRequest


class Bytes:
    """A source of bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        data = self._file.read(size) if size < 2**40 else b""
        if len(data) != size:
            raise Unscannable("it ends too early")
        return data

    def skip(self, size: int) -> None:
        self.read(size)

    def line(self, limit: int) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise Unscannable("no line")
        return line[:-1][:limit]


def found(data: bytes) -> set[tuple[str, str]]:
    return imports(Bytes(data))


def dangerous(data: bytes) -> list[str]:
    return pickle_verdicts.dangerous(found(data), ())


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(protocol):
    data = pickle.dumps(
        {"a": [OrderedDict(x=1), Runs(os.system, "true")], "b": (1, 2.5, None, b"x")}, protocol
    )
    assert ("posix", "system") in found(data)
    assert dangerous(data) == ["posix.system"]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_are_safe(protocol):
    value = {
        "weights": np.arange(2000.0),
        "names": ["a"] * 300,
        "nested": [{1: {2}}, frozenset({3}), 2**80, True],
    }
    assert dangerous(pickle.dumps(value, protocol)) == []


def test_the_same_imports_as_pickletools_sees():
    data = pickle.dumps([np.dtype("f4"), np.float64(1.5), OrderedDict(), Path("/x")], 2)
    seen = {tuple(str(arg).split(" ")) for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
    assert found(data) == seen


HIDDEN = [
    (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
    (b"(S'true'\nios\nsystem\n.", "os.system"),
    (b"(cos\nsystem\nS'true'\no.", "os.system"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    (b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.", "os.system"),
    (b"\x80\x04X\x02\0\0\0osX\x06\0\0\0system\x93.", "os.system"),
    # The module's name is written with an escape, or is computed: nobody can tell what it is.
    (b"\x80\x04V\\u006fs\n\x8c\x06system\x93.", "unknown.unknown"),
    (b"\x80\x04N\x8c\x06system\x93.", "unknown.unknown"),
    (b"\x80\x04h\x05\x8c\x06system\x93.", "unknown.unknown"),
    (b"\x82\x07.", "unknown.extension"),
    (b"cbuiltins\neval\n.", "builtins.eval"),
    (b"cbuiltins\n__import__\n.", "builtins.__import__"),
    (b"cimportlib\nimport_module\n.", "importlib.import_module"),
    (b"cnumpy\nload\n.", "numpy.load"),
    (b"cjoblib\nload\n.", "joblib.load"),
    (b"cpandas.io.pickle\nread_pickle\n.", "pandas.io.pickle.read_pickle"),
]


@pytest.mark.parametrize(("data", "name"), HIDDEN)
def test_hidden_imports(data, name):
    assert dangerous(data) == [name]


BROKEN = [
    b"", b"N", b"\xff.", b"R.", b"\x80\x04\x95", b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"cos\nsystem",
    b"\x8b\xff\xff\xff\xff.", b"I01\nq\x00\x94.", b"gx\n.", b"e.", b"\x93.",
]  # fmt: skip


@pytest.mark.parametrize("data", BROKEN)
def test_broken_pickles_are_refused(data):
    with pytest.raises(Unscannable):
        found(data)


def array_of_joblib(datatype: Any, shape: tuple[int, ...], raw: bytes, rest: bytes) -> bytes:
    """A pickle as joblib writes it: an array's description, then the raw array, then more opcodes."""
    state = {
        "shape": shape,
        "order": "C",
        "dtype": datatype,
        "allow_mmap": True,
        "numpy_array_alignment_bytes": 16,
    }
    described = pickle.dumps(state, 2)[2:-1]
    wrapper = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + described + b"b"
    padding = b"\x03" + b"\xff" * 3
    return b"\x80\x02(" + wrapper + padding + raw + rest + b"l."


def test_arrays_of_joblib_are_skipped_and_what_follows_is_found():
    # Raw floats that would be opcodes: an import of os.system that never happens.
    raw = b"cos\nsystem\n".ljust(16, b".")
    data = array_of_joblib(np.dtype("f8"), (2,), raw, b"cposix\nsystem\n")
    assert dangerous(data) == ["posix.system"]
    assert ("os", "system") not in found(data)
    records = np.dtype([("a", "<i8"), ("b", "<f4")])
    assert dangerous(array_of_joblib(records, (1, 3), b"\0" * 36, b"N")) == []


def test_objects_in_an_array_of_joblib_are_another_pickle():
    state = {"shape": (1,), "order": "C", "dtype": np.dtype("O"), "allow_mmap": False}
    wrapper = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b"
    inner = pickle.dumps(Runs(os.system, "true"), 2)
    assert dangerous(b"\x80\x02(" + wrapper + inner + b"cnt\nsystem\nl.") == ["nt.system", "posix.system"]


def test_an_array_with_a_lying_shape_is_refused():
    with pytest.raises(Unscannable):
        found(array_of_joblib(np.dtype("f8"), (10**9,), b"\0" * 16, b"N"))
    described = pickle.dumps({"shape": (1,), "dtype": np.dtype("f8")}, 2)[2:-1].replace(b"f8", b"fz")
    with pytest.raises(Unscannable, match="unknown datatype"):
        found(b"\x80\x02cjoblib.numpy_pickle\nNumpyArrayWrapper\n)\x81" + described + b"b.")


def test_a_name_must_be_trusted_one_by_one():
    names = ["builtins.eval", "posix.system"]
    with pytest.raises(
        BadRequest, match=r"imports builtins\.eval, posix\.system.*--trust builtins\.eval --trust"
    ):
        pickle_verdicts.check(names, ())
    with pytest.raises(BadRequest, match=r"imports posix\.system, which"):
        pickle_verdicts.check(names, ["builtins.eval"])
    pickle_verdicts.check(names, names)


def test_other_packages_are_named():
    (note,) = pickle_verdicts.notes([("mine.steps", "Scale"), ("sklearn.svm", "SVC"), ("builtins", "list")])
    assert "the packages mine, and" in note
    assert pickle_verdicts.notes([("numpy", "dtype")]) == []


def test_a_flood_of_opcodes_ends():
    from services.registry.domain import pickle_machine

    assert pickle_machine.MAX_OPCODES <= 10_000_000
    deep = b"(" * 600_000 + b"."
    with pytest.raises(Unscannable, match="more than"):
        found(struct.pack("<2s", b"\x80\x02") + deep)


@pytest.mark.fuzz
@given(data=st.data())
def test_a_changed_pickle_never_breaks_the_machine(data):
    value = {"a": [OrderedDict(x=1), np.arange(3.0)], "b": Runs(os.system, "true")}
    content = bytearray(pickle.dumps(value, data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Unscannable):
        found(bytes(content[: data.draw(st.integers(1, len(content)))]))
