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

    @property
    def at(self) -> int:
        return self._file.tell()

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
    # Modules have other modules as attributes.
    (b"\x80\x04\x8c\x04enum\x8c\x0abltns.eval\x93.", "enum.bltns.eval"),
    (b"\x80\x04\x8c\x0bcollections\x8c\x0c_sys.modules\x93.", "collections._sys.modules"),
    (b"\x80\x04\x8c\x0bjoblib.disk\x8c\x09os.system\x93.", "joblib.disk.os.system"),
    (b"cjoblib.disk\nos\n.", "joblib.disk.os"),
    (b"\x80\x04\x8c\x06pandas\x8c\x0fDataFrame.query\x93.", "pandas.DataFrame.query"),
    (b"cnumpy.core.memmap\nmemmap\n.", "numpy.core.memmap.memmap"),
    (b"cjoblib.numpy_pickle\nload\n.", "joblib.numpy_pickle.load"),
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


WRAPPER = b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n"
PLAIN = {"shape": (1,), "order": "C", "dtype": np.dtype("f8"), "allow_mmap": False}


def described(**changes: Any) -> bytes:
    return pickle.dumps({**PLAIN, **changes}, 2)[2:-1]


def numpy_type(code: str, *state: Any) -> Any:
    class Type:
        def __reduce__(self) -> Any:
            return np.dtype, (code, False, True), state

    return Type()


def simple(code: str, version: int, flags: int) -> Any:
    return numpy_type(code, version, "|", None, None, None, -1, -1, flags)


NEW = WRAPPER + b")\x81"
UNCLEAR = [
    # joblib and the machine would disagree about the length of the array, or if there is one.
    (NEW + described(numpy_array_alignment_bytes=True) + b"b", "alignment"),
    (NEW + described() + b"V\\u0073hape\nK\x02\x85sb", "description of a joblib array cannot be read"),
    (NEW + described(**{f"x{n}": 1 for n in range(70)}) + b"b", "description of a joblib array cannot be"),
    (NEW + described(dtype=simple("f8", 2, 0)) + b"b", "state"),
    (NEW + described(dtype=simple("f8", 3, 1)) + b"b", "flags"),
    (NEW + described(dtype=simple("O8", 3, 0)) + b"b", "flags"),
    (WRAPPER + b")R" + described() + b"b", "unknown way"),
    (NEW + b"q\xf0" + described() + b"b" + b"\0" * 8 + b"h\xf0" + described() + b"b", "twice"),
    (b"cbuiltins\nmin\n(" + NEW + b"l\x85R" + described() + b"b", "as an ordinary value"),
    (b"ccopyreg\n_reconstructor\n" + WRAPPER + b"NN\x87R" + described() + b"b", "as an ordinary value"),
    (WRAPPER + b"}X\x05\0\0\0shapeK\x01\x85sb", "the pickle imports joblib.* and changes it"),
    (b"\x95\xff\0\0\0\0\0\0\0" + NEW + described() + b"b", "frame"),
]  # fmt: skip


@pytest.mark.parametrize(("start", "text"), UNCLEAR)
def test_an_array_whose_end_is_unclear_is_refused(start: bytes, text: str):
    with pytest.raises(Unscannable, match=text):
        found(b"\x80\x04" + start + b"\0" * 64 + b".")


def test_the_size_of_a_datatype_is_that_of_its_state():
    pair = numpy_type("V1", 3, "|", None, None, None, 16, 1, 0)
    assert dangerous(array_of_joblib(pair, (2,), b"\0" * 32, b"cposix\nsystem\n")) == ["posix.system"]
    for honest in ("M8[ns]", "U2", "S8", "?", "c16"):
        datatype = np.dtype(honest)
        raw = b"\0" * 2 * datatype.itemsize
        assert dangerous(array_of_joblib(datatype, (2,), raw, b"cposix\nsystem\n")) == ["posix.system"]


def test_only_joblib_reads_arrays_and_only_outside_of_other_arrays():
    array = array_of_joblib(np.dtype("f8"), (1,), b"\0" * 8, b"N")
    assert dangerous(array) == []
    with pytest.raises(Unscannable, match="in a place where joblib reads none"):
        imports(Bytes(array), arrays=False)
    outer = b"\x80\x02" + WRAPPER + b")\x81" + described(dtype=np.dtype("O")) + b"b" + array + b"."
    with pytest.raises(Unscannable, match="in a place where joblib reads none"):
        found(outer)


def test_classes_in_classes_are_what_they_seem():
    harmless = [("mine.models", "Outer._Inner"), ("zoneinfo", "ZoneInfo._unpickle"), ("enum", "IntEnum")]
    assert pickle_verdicts.dangerous(harmless, ()) == []


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
