"""Find the imports of a pickle without executing it. Pure.

A small machine runs the opcodes on a stack of symbols instead of objects. joblib writes arrays between the
opcodes. Before each array, the pickle states the shape and datatype of the array. So the machine can skip the
array.

The library picklescan cannot be used here. It stops at the first array, and it keeps all opcodes in memory.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_OPCODES = 10_000_000
MAX_KEPT = 1_000_000
"""The most values that are remembered for later use. An import that uses another one counts as unknown."""
MAX_STACK = 500_000
_LONGEST_TEXT, _LONGEST_LINE, _LONGEST_TUPLE = 256, 65_536, 64
UNKNOWN = "unknown"

Import = tuple[str, str]


class Unscannable(Exception):
    """The bytes are not a pickle, are damaged, or exceed a limit. The message says which."""


class Source(Protocol):
    """The unpacked bytes of a pickle, read sequentially."""

    @property
    def at(self) -> int:
        """Return how many bytes were read or skipped."""

    def read(self, size: int) -> bytes:
        """Read exactly ``size`` bytes. Raise Unscannable if fewer remain."""

    def skip(self, size: int) -> None:
        """Skip ``size`` bytes. Raise Unscannable if fewer remain."""

    def line(self, limit: int) -> bytes:
        """Read a whole line. Return at most its first ``limit`` bytes, without the line feed.

        Raise Unscannable if the line has no end.
        """


class _Symbol:
    def __init__(self, name: str) -> None:
        self.name = name


MARK, OPAQUE, NOTHING = _Symbol("mark"), _Symbol("opaque"), _Symbol("None")


@dataclass(slots=True, eq=False)
class Made:
    """A symbol for an object that the pickle creates.

    ``made_by``: the imported class or function that creates the object. ``arguments``: the arguments of that
    call. ``state``: the state that the opcode BUILD gives to the object.
    """

    made_by: Import
    arguments: Any = OPAQUE
    state: Any = OPAQUE


@dataclass(frozen=True, slots=True)
class Ref:
    """An imported name on the stack."""

    name: Import


def imports(source: Source, *, arrays: bool = True) -> set[Import]:
    """Return the imports that would run when the pickle is loaded, each as (module, name).

    ``arrays`` True: joblib loads the file, so arrays can be between the opcodes. ``arrays`` False: Python's
    own ``pickle`` loads it.

    Raise Unscannable if the bytes are not a pickle, are damaged, or exceed a limit.
    """
    return _Machine(source, _Budget(), arrays=arrays).run()


@dataclass(slots=True)
class _Budget:
    opcodes: int = MAX_OPCODES
    kept: int = MAX_KEPT
    found: set[Import] = field(default_factory=set)


_BY_CODE = {ord(each.code): each for each in pickletools.opcodes}
_INTS = {
    "BININT": "<i", "BININT1": "<B", "BININT2": "<H",
}  # fmt: skip
_FIXED = {"BINFLOAT": 8, "EXT1": 1, "EXT2": 2, "EXT4": 4, "PROTO": 1, "FRAME": 0}
_LENGTHS = {
    "SHORT_BINSTRING": "<B", "BINSTRING": "<i", "SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q",
    "BYTEARRAY8": "<Q", "SHORT_BINUNICODE": "<B", "BINUNICODE": "<I", "BINUNICODE8": "<Q", "LONG1": "<B",
    "LONG4": "<i",
}  # fmt: skip
_LINES = frozenset({"INT", "LONG", "FLOAT", "STRING", "UNICODE", "PERSID", "GET", "PUT"})
_GETS, _PUTS = {"BINGET": "<B", "LONG_BINGET": "<I"}, {"BINPUT": "<B", "LONG_BINPUT": "<I"}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_LIST": lambda: OPAQUE, "EMPTY_SET": lambda: OPAQUE,
    "NONE": lambda: NOTHING, "NEWTRUE": lambda: OPAQUE, "NEWFALSE": lambda: OPAQUE, "MARK": lambda: MARK,
    "NEXT_BUFFER": lambda: OPAQUE,
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# _WRAPPER: joblib's class for the description of an array. _DTYPE: numpy's datatype. _INCOMPLETE: a key that
# marks an incomplete dict.
_WRAPPER, _DTYPE, _INCOMPLETE = ("joblib.numpy_pickle", "NumpyArrayWrapper"), ("numpy", "dtype"), None
# The kinds of numpy's datatypes. _SIZED: kinds whose size is part of the datatype's code, such as "f8".
# _STATED: kinds whose size is read from the pickled state of the datatype, such as "V".
_SIZED, _STATED = frozenset("biufcmM"), frozenset("SUV")


class _Machine:
    def __init__(self, source: Source, budget: _Budget, *, arrays: bool) -> None:
        self._source, self._budget, self._arrays = source, budget, arrays
        self._frame_end = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._memoized = 0
        self._numbered = False

    def run(self) -> set[Import]:
        while (code := self._source.read(1)[0]) != ord("."):
            self._budget.opcodes -= 1
            opcode = _BY_CODE.get(code)
            if self._budget.opcodes < 0 or len(self._stack) > MAX_STACK:
                raise Unscannable(
                    f"the pickle has more than {MAX_OPCODES} opcodes, or more than {MAX_STACK} values on "
                    "its stack"
                )
            if opcode is None:
                raise Unscannable(f"the pickle has the byte {code:#x} where an opcode is expected")
            self._step(opcode.name)
        return self._budget.found

    def check_frame(self) -> None:
        """Raise Unscannable if the source is in the middle of a pickle frame.

        An unpickler reads all bytes of a frame together. So an array or another frame can begin only after
        the end of the frame.
        """
        if self._source.at < self._frame_end:
            raise Unscannable("the pickle has other data in the middle of a frame")

    # --- the stack ---------------------------------------------------------------------------------------

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _take(self) -> Any:
        if not self._stack:
            raise Unscannable("the pickle takes a value from an empty stack")
        return self._stack.pop()

    def _pop(self) -> Any:
        """Remove and return the top value. Raise Unscannable if it is the description of an array.

        Only the opcode BUILD may use a description, because the array follows directly after this opcode. If
        a function could get a description, joblib might read an array that the machine does not expect.
        """
        value = self._take()
        if _is_wrapper(value):
            raise Unscannable("the pickle uses joblib's description of an array as an ordinary value")
        return value

    def _pop_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._pop()) is not MARK:
            values.append(value)
        values.reverse()
        return values

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._source.read(struct.calcsize(code)))[0])

    def _keep(self, at: int, value: Any) -> None:
        if value is OPAQUE or value is NOTHING:
            self._memo.pop(at, None)
            return
        self._budget.kept -= 1
        if self._budget.kept >= 0:
            self._memo[at] = value
        else:
            self._memo.pop(at, None)

    # --- opcodes -----------------------------------------------------------------------------------------

    def _step(self, name: str) -> None:
        if name in _EMPTY:
            self._push(_EMPTY[name]())
        elif name in _LENGTHS:
            self._push(self._long_value(name))
        elif name in _INTS:
            self._push(self._number(_INTS[name]))
        elif name in _GETS or name in _PUTS or name == "MEMOIZE":
            self._remember(name)
        elif name in _LINES:
            self._line(name)
        elif name in _FIXED:
            self._fixed(name)
        elif name in _TUPLES:
            values = [self._pop() for _ in range(_TUPLES[name])]
            self._push(tuple(reversed(values)))
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            self._import(name)
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"):
            self._make(name)
        else:
            self._collect(name)

    def _fixed(self, name: str) -> None:
        self._source.skip(_FIXED[name])
        if name == "FRAME":
            size = self._number("<Q")
            self.check_frame()
            self._frame_end = self._source.at + size
        elif name == "BINFLOAT":
            self._push(OPAQUE)
        elif name.startswith("EXT"):
            # An extension code is a number in a table of the process that loads the pickle. The registry does
            # not have that table, so the import counts as unknown.
            self._found((UNKNOWN, "extension"))

    def _long_value(self, name: str) -> Any:
        length = self._number(_LENGTHS[name])
        if length < 0:
            raise Unscannable("the pickle states a negative length")
        if name in ("LONG1", "LONG4") and length <= 8:
            return int.from_bytes(self._source.read(length), "little", signed=True)
        if length > _LONGEST_TEXT or "BYTE" in name or name in ("LONG1", "LONG4"):
            self._source.skip(length)
            return OPAQUE
        return self._source.read(length).decode("utf-8", "replace")

    def _remember(self, name: str) -> None:
        if name == "MEMOIZE":
            self._keep(self._memoized, self._top())
            self._memoized += 1
            if self._numbered:
                raise Unscannable("the pickle numbers its values in two different ways")
        elif name in _PUTS:
            self._put(self._number(_PUTS[name]))
        else:
            self._push(self._memo.get(self._number(_GETS[name]), OPAQUE))

    def _put(self, at: int) -> None:
        self._numbered = True
        if self._memoized:
            raise Unscannable("the pickle numbers its values in two different ways")
        self._keep(at, self._top())

    def _top(self) -> Any:
        if not self._stack:
            raise Unscannable("the pickle takes a value from an empty stack")
        return self._stack[-1]

    def _line(self, name: str) -> None:
        line = self._source.line(_LONGEST_LINE).strip()
        if name in ("GET", "PUT"):
            if not (line.isdigit() and len(line) < 10):
                raise Unscannable("the pickle has no number where a number is expected")
            if name == "PUT":
                self._put(int(line))
            else:
                self._push(self._memo.get(int(line), OPAQUE))
        elif name in ("INT", "LONG") and line.rstrip(b"L").isdigit() and len(line) < 20:
            self._push(int(line.rstrip(b"L")))
        elif name == "STRING":
            self._push(self._quoted(line))
        elif name == "UNICODE" and b"\\" not in line and len(line) <= _LONGEST_TEXT:
            self._push(line.decode("utf-8", "replace"))
        else:
            self._push(OPAQUE)

    def _quoted(self, line: bytes) -> Any:
        plain = len(line) >= 2 and line[:1] == line[-1:] and line[:1] in (b"'", b'"') and b"\\" not in line
        return line[1:-1].decode("utf-8", "replace") if plain and len(line) <= _LONGEST_TEXT else OPAQUE

    # --- imports and objects -----------------------------------------------------------------------------

    def _found(self, name: Import) -> None:
        self._budget.found.add(name)
        if len(self._budget.found) > 100_000:
            raise Unscannable("the pickle imports more than 100,000 names")
        self._push(Ref(name))

    def _import(self, opcode: str) -> None:
        if opcode == "STACK_GLOBAL":
            name, module = self._pop(), self._pop()
            known = isinstance(name, str) and isinstance(module, str)
            self._found((module, name) if known else (UNKNOWN, UNKNOWN))
            return
        module, name = (self._source.line(_LONGEST_LINE).decode("utf-8", "replace").strip() for _ in range(2))
        if opcode == "INST":
            self._pop_mark()
        self._found((module, name))
        if opcode == "INST":
            self._pop()
            self._push(Made((module, name)))

    def _make(self, opcode: str) -> None:
        if opcode == "OBJ":
            values = self._pop_mark()
            maker, arguments = (values[0], tuple(values[1:])) if values else (OPAQUE, ())
        else:
            if opcode == "NEWOBJ_EX":
                self._pop()
            arguments, maker = self._pop(), self._take()
            if _is_wrapper(maker) and (opcode, arguments) != ("NEWOBJ", ()):
                raise Unscannable("the pickle makes the description of a joblib array in an unknown way")
        self._push(Made(maker.name, arguments) if isinstance(maker, Ref) else OPAQUE)

    def _collect(self, name: str) -> None:
        if name in ("APPEND", "BINPERSID", "POP"):
            self._pop()
            if name == "BINPERSID":
                self._push(OPAQUE)
        elif name in ("APPENDS", "ADDITEMS", "POP_MARK"):
            self._pop_mark()
        elif name in ("LIST", "FROZENSET"):
            self._pop_mark()
            self._push(OPAQUE)
        elif name == "TUPLE":
            values = self._pop_mark()
            self._push(tuple(values) if len(values) <= _LONGEST_TUPLE else OPAQUE)
        elif name == "DICT":
            self._push(_set({}, self._pop_mark()))
        elif name == "SETITEMS":
            pairs = self._pop_mark()
            _set(self._top(), pairs)
        elif name == "SETITEM":
            value, key = self._pop(), self._pop()
            _set(self._top(), [key, value])
        elif name == "DUP":
            self._push(self._top())
        elif name == "BUILD":
            self._build(self._pop())
        elif name != "READONLY_BUFFER":
            raise Unscannable(f"the pickle has the opcode {name}, which the registry does not support")

    def _build(self, state: Any) -> None:
        made = self._top()
        if isinstance(made, Ref):
            raise Unscannable(f"the pickle imports {'.'.join(made.name)[:200]} and changes it")
        if not isinstance(made, Made):
            return
        if made.made_by in (_WRAPPER, _DTYPE) and made.state is not OPAQUE:
            raise Unscannable("the pickle builds the description of an array twice")
        made.state = state
        if made.made_by == _WRAPPER:
            self._skip_array(state)
            self._stack[-1] = OPAQUE  # joblib replaces the description by the array

    def _skip_array(self, state: Any) -> None:
        """Skip an array: first the padding, then the bytes.

        joblib writes an array directly after its description.
        """
        if not self._arrays:
            raise Unscannable("the pickle has a joblib array in a place where joblib reads none")
        self.check_frame()
        if not isinstance(state, dict) or _INCOMPLETE in state:
            raise Unscannable("the description of a joblib array cannot be read")
        shape, datatype = state.get("shape"), state.get("dtype")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise Unscannable("a joblib array has no shape")
        if not isinstance(datatype, Made) or datatype.made_by != _DTYPE:
            raise Unscannable("a joblib array has no datatype")
        if _has_objects(datatype):
            # joblib loads an array of objects as a plain pickle. Such a pickle cannot contain joblib arrays.
            inner = _Machine(self._source, self._budget, arrays=False)
            inner.run()
            inner.check_frame()
            return
        alignment = state.get("numpy_array_alignment_bytes", NOTHING)
        if alignment is not NOTHING and type(alignment) is not int:
            raise Unscannable("a joblib array has an unknown alignment")
        if alignment is not NOTHING:
            self._source.skip(self._source.read(1)[0])
        self._source.skip(math.prod(shape) * _item_size(datatype))


def _is_wrapper(value: Any) -> bool:
    return (isinstance(value, Ref) and value.name == _WRAPPER) or (
        isinstance(value, Made) and value.made_by == _WRAPPER
    )


def _set(target: Any, pairs: list[Any]) -> Any:
    """Add the pairs to a dict. If the dict is full or a key is not a text, mark the dict as incomplete.

    Only the dicts that describe arrays are needed later. They are small and have only text keys.
    """
    if isinstance(target, dict):
        for key, value in zip(pairs[::2], pairs[1::2], strict=False):
            if isinstance(key, str) and (key in target or len(target) < _LONGEST_TUPLE):
                target[key] = value
            else:
                target[_INCOMPLETE] = OPAQUE
    return target


def _code_of(datatype: Made) -> str:
    arguments = datatype.arguments
    code = arguments[0] if isinstance(arguments, tuple) and arguments else None
    code = code.lstrip("<>|=") if isinstance(code, str) else ""
    if code[:1] not in _SIZED | _STATED | {"O"} or not (code[1:].isdecimal() or code == "O"):
        raise Unscannable(f"a joblib array has the unknown datatype {code[:20]!r}")
    return code


def _state_of(datatype: Made) -> tuple[int, int]:
    """Return the size in bytes and the flags from a datatype's state.

    Raise Unscannable if the state has an unknown form or a version before 3. For such a version, numpy
    ignores the flags in the state and computes them itself. So the flags in the state can be wrong.
    """
    state = datatype.state
    known = isinstance(state, tuple) and len(state) in (8, 9) and state[0] in (3, 4)
    if not known or any(type(state[at]) is not int for at in (0, 5, 7)):
        raise Unscannable("a joblib array has a datatype with an unknown state")
    return state[5], state[7]


def _has_objects(datatype: Made) -> bool:
    """Return True if the array contains references to objects.

    The first flag of the datatype shows this. Raise Unscannable if the flags do not fit the kind of the
    datatype.
    """
    kind, (_, flags) = _code_of(datatype)[0], _state_of(datatype)
    if kind != "V" and bool(flags & 1) != (kind == "O"):
        raise Unscannable("a joblib array has a datatype with wrong flags")
    return bool(flags & 1)


def _item_size(datatype: Made) -> int:
    code, (size, _) = _code_of(datatype), _state_of(datatype)
    if code[0] in _STATED:
        if size < 0:
            raise Unscannable("a joblib array has a datatype without a size")
        return size
    if len(code) > 4:
        raise Unscannable(f"a joblib array has the unknown datatype {code[:20]!r}")
    return 8 if code[0] in "mM" else int(code[1:])
