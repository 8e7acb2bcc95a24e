"""What a request must be: checks that hold whatever form it came in, JSON, binary or protobuf.

A codec (``oip.py`` for REST; the gateway's gRPC room has the other) reads its form and asks here. Errors name
the tensor, what was expected and what came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol.bounded_json import shown
from tidegate.kernel.protocol.envelope import KEPT_KEY, LAST_PRIORITY, MAX_KEY, Buffer, Tensor, call_key
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.tensors import (
    BINARY_ONLY,
    DATATYPES,
    MAX_STRINGS,
    Datatype,
    check_count,
    count_strings,
    elements,
)

# What tells the door how to answer, or the gateway how to queue; the model does not see it.
_FOR_US = frozenset({"binary_data_output", "binary_data", "binary_data_size", "classification"})
_FOR_THE_QUEUE = frozenset({"timeout", "priority"})
# Triton's own request parameters; those that a queue cannot honour are refused.
_STATEFUL = {"sequence_id", "sequence_start", "sequence_end"}
_SHARED_MEMORY = {"shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"}

_KEYS_KEPT = 1024
# What the call key has room for; see tidegate.kernel.protocol.envelope.
_MAX_NAME, _MAX_DIMS, _MAX_DIM = 255, 255, 2**63 - 1
_MAX_INT = 2**63
RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that the caller asked for, and how: as raw bytes; as its ``classes`` highest values."""

    name: str
    binary: bool
    classes: int = 0


class Decoded(NamedTuple):
    """A request, decoded. ``wanted`` None: every output; ``binary`` is the default form of outputs.

    ``timeout_ms`` is the caller's own, None without; ``priority`` 1 goes first, 0: none was given.
    """

    id: str
    rows: int
    key: bytes
    data: list[Buffer]
    wanted: tuple[WantedOutput, ...] | None
    binary: bool
    timeout_ms: float | None = None
    priority: int = 0


class Options(NamedTuple):
    """A request's parameters, sorted by whom they are for."""

    for_model: dict[str, Any]
    timeout_ms: float | None = None
    priority: int = 0


_NO_OPTIONS = Options({})


@dataclass(slots=True)
class Contract:
    """A signature made ready for checking requests; None: anything goes, the model server decides."""

    signature: Signature | None
    inputs: dict[str, tuple[int, Tensor]] = field(init=False, default_factory=dict)
    outputs: frozenset[str] = field(init=False, default=frozenset())
    required: frozenset[str] = field(init=False, default=frozenset())
    binary_only: frozenset[str] = field(init=False, default=frozenset())
    max_batch: int = field(init=False, default=0)
    _keys: dict[Any, bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.signature is None:
            return
        for at, spec in enumerate(self.signature.inputs):
            tensor = Tensor(spec.name, DATATYPES[spec.datatype], tuple(spec.shape))
            self.inputs[spec.name] = (at, tensor)
        self.outputs = frozenset(spec.name for spec in self.signature.outputs)
        self.binary_only = frozenset(s.name for s in self.signature.outputs if s.datatype in BINARY_ONLY)
        self.required = frozenset(spec.name for spec in self.signature.inputs if not spec.optional)
        self.max_batch = self.signature.max_batch_size

    @property
    def may_be_empty(self) -> bool:
        """Whether a request without any input makes sense: all are optional, none has to tell the rows."""
        return self.signature is not None and not self.required and not self.max_batch

    def key(self, inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
        """The call key; the same shapes come again and again, so it is made once for each.

        Raises BadRequest when it is too large.
        """
        known = None if parameters else self._keys.get((inputs, outputs))
        if known is not None:
            return known
        made = _bounded(inputs, outputs, parameters)
        if not parameters and len(made) <= KEPT_KEY:
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            self._keys[(inputs, outputs)] = made
        return made

    def want(self, name: str, binary: bool, parameters: dict[str, Any]) -> WantedOutput:
        """A requested output, checked; raises BadRequest."""
        if self.outputs and name not in self.outputs:
            raise BadRequest(f"output {name!r} does not exist; the model gives {sorted(self.outputs)}")
        check_name("output", name)
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise BadRequest(
                f"output {name!r}: classification must be a number of classes, got {shown(classes)}"
            )
        binary = bool(parameters.get("binary_data", binary))
        if name in self.binary_only and not (binary or classes):
            raise json_refusal(name)
        return WantedOutput(name, binary, classes)

    def want_all(self, binary: bool) -> None:
        """All outputs in the default form; raises BadRequest when one cannot have it."""
        if self.binary_only and not binary:
            raise json_refusal(min(self.binary_only))


class Inputs:
    """The inputs of one request, checked one after the other: for each ``expect``, then ``put``."""

    __slots__ = ("_contract", "_datatype", "_dims", "_seen", "_shape", "_slot", "_slots", "name", "rows")

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._slots: list[tuple[int, Tensor, Buffer]] = []
        self._seen: set[str] = set()
        self.rows = -1

    def expect(self, name: str, datatype: Any, shape: list[int]) -> Datatype:
        """An input of this description; gives the datatype by which to read its data. Raises BadRequest."""
        if name in self._seen:
            raise BadRequest(f"input {name!r} is given twice")
        self._slot, self._datatype, self._dims, rows = _checked(
            name, datatype, shape, len(self._seen), self._contract
        )
        self._seen.add(name)
        if self.rows not in (-1, rows):
            raise BadRequest(f"input {name!r}: batch size {rows}, but the inputs before it have {self.rows}")
        self.name, self.rows = name, rows
        return self._datatype

    def put(self, raw: Buffer) -> None:
        """The raw bytes of the input that was expected last."""
        self._slots.append((self._slot, Tensor(self.name, self._datatype, self._dims), raw))

    def done(self) -> tuple[tuple[Tensor, ...], list[Buffer], int]:
        """The tensors and their data in the signature's order, and the rows; raises BadRequest."""
        contract, slots = self._contract, self._slots
        if not slots and not contract.may_be_empty:
            raise BadRequest(
                f"'inputs' must be a list of tensors; the model takes {sorted(contract.inputs) or 'any'}"
            )
        if missing := contract.required - self._seen:
            names = ", ".join(map(repr, sorted(missing)))
            raise BadRequest(f"missing input {names}; the model takes {list(contract.inputs)}")
        slots.sort(key=lambda entry: entry[0])
        return tuple(entry[1] for entry in slots), [entry[2] for entry in slots], max(self.rows, 0)


def _bounded(inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
    names = len(inputs) + len(outputs)
    size = 2 * names  # at least; the key counts them in 16 bits
    if size <= MAX_KEY:
        key = call_key(inputs, outputs, parameters)
        if len(key) <= MAX_KEY:
            return key
        size = len(key)
    raise BadRequest(
        f"the names, shapes and parameters of {names} tensors take {size} bytes, at most {MAX_KEY} are "
        "possible: send what is large as a tensor"
    )


def check_parameters(found: Any, where: str) -> dict[str, Any]:
    """The parameters of a request, an input or an output, without what a queue cannot honour: BadRequest."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadRequest(f"{where}: 'parameters' must be an object")
    if not found.keys().isdisjoint(_STATEFUL) and found.get("sequence_id"):
        raise BadRequest(
            f"{where}: stateful sequences (sequence_id) are not supported: any worker may answer"
        )
    if not found.keys().isdisjoint(_SHARED_MEMORY):
        raise BadRequest(
            f"{where}: shared memory regions are not supported: the model may run on another host"
        )
    return found


def options(parameters: dict[str, Any]) -> Options:
    """A request's checked parameters, sorted; ``timeout`` is in microseconds, as in Triton: BadRequest."""
    if not parameters:
        return _NO_OPTIONS
    for_model = {}
    for name, value in parameters.items():
        if name in _FOR_US or name in _STATEFUL:
            continue
        if name in _FOR_THE_QUEUE:
            if type(value) is not int or not 0 <= value < _MAX_INT:
                raise BadRequest(
                    f"parameter {shown(name)} must be a whole number, not negative, got {shown(value)}"
                )
        elif name.startswith("triton_"):
            raise BadRequest(f"parameter {shown(name)}: names that begin with triton_ are Triton's own")
        elif not isinstance(value, str | int | float):
            raise BadRequest(f"parameter {shown(name)} must be a string, a number or a boolean")
        elif isinstance(value, float) and not isfinite(value):
            raise BadRequest(f"parameter {shown(name)} must be a finite number, got {value}")
        elif isinstance(value, int) and not -_MAX_INT <= value < _MAX_INT:
            raise BadRequest(
                f"parameter {shown(name)} must fit into 64 bits, got a number of {len(str(value))} digits"
            )
        else:
            for_model[name] = value
    timeout_us = parameters.get("timeout", 0)
    priority = min(parameters.get("priority", 0), LAST_PRIORITY)
    return Options(for_model, timeout_us / 1e3 if timeout_us else None, priority)


def check_name(kind: str, name: str) -> None:
    """Raise BadRequest for the name of an input or output that is longer than any: it would be told back."""
    if len(name) > _MAX_NAME or (not name.isascii() and len(name.encode()) > _MAX_NAME):
        raise BadRequest(f"{kind} {shown(name)}: a name may have {_MAX_NAME} bytes")


def check_shape(name: str, shape: Any) -> list[int]:
    """A tensor's shape, whole; raises BadRequest."""
    if isinstance(shape, list) and len(shape) > _MAX_DIMS:
        raise BadRequest(f"input {name!r}: {len(shape)} dimensions, at most {_MAX_DIMS} are possible")
    if not isinstance(shape, list) or not all(type(d) is int and 0 <= d <= _MAX_DIM for d in shape):
        raise BadRequest(f"input {name!r}: 'shape' must be a list of sizes, got {shown(shape)}")
    if elements(shape) > _MAX_DIM:
        raise BadRequest(f"input {name!r}: 'shape' says more than {_MAX_DIM} elements")
    return shape


def _checked(
    name: str, datatype: Any, shape: list[int], order: int, contract: Contract
) -> tuple[int, Datatype, tuple[int, ...], int]:
    """The tensor's slot, datatype, dims without the batch axis, and rows (0: no batch axis)."""
    if contract.signature is None:
        check_name("input", name)
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise BadRequest(
                f"input {name!r}: unknown datatype {shown(datatype)}; one of {sorted(DATATYPES)}"
            )
        return order, DATATYPES[datatype], tuple(shape), 0
    if name not in contract.inputs:
        raise BadRequest(f"input {name!r} does not exist; the model takes {list(contract.inputs)}")
    slot, spec = contract.inputs[name]
    if datatype != spec.datatype.name:
        raise BadRequest(f"input {name!r}: expected datatype {spec.datatype.name}, got {shown(datatype)}")
    batched = contract.max_batch > 0
    dims = tuple(shape[1:]) if batched else tuple(shape)
    fits = len(dims) == len(spec.dims) and all(e in (-1, d) for e, d in zip(spec.dims, dims, strict=True))
    if not fits or (batched and not shape):
        expected = (["batch"] if batched else []) + list(spec.dims)
        raise BadRequest(f"input {name!r}: expected shape {expected}, got {shape}")
    rows = shape[0] if batched else 0
    if batched and not 1 <= rows <= contract.max_batch:
        raise BadRequest(f"input {name!r}: batch size {rows} is not in 1..{contract.max_batch}")
    return slot, spec.datatype, dims, rows


def check_size(name: str, datatype: Datatype, shape: list[int], raw: Buffer) -> None:
    """Raw bytes must be as many as datatype and shape say; raises BadRequest."""
    count, size = elements(shape), datatype.size
    if size and len(raw) != count * size:
        raise BadRequest(
            f"input {name!r}: {datatype.name} {shape} needs {count * size} bytes, got {len(raw)}"
        )
    if not size:
        check_count(name, count)
        try:
            found = count_strings(raw)
        except ValueError as error:
            raise BadRequest(
                f"input {name!r}: the BYTES data is malformed: {error}; each element is its length as 4 "
                "bytes, little-endian, and then its bytes"
            ) from None
        if found != count:
            got = found if found <= MAX_STRINGS else f"more than {MAX_STRINGS}"
            raise BadRequest(f"input {name!r}: shape {shape} needs {count} elements, got {got}")


def inputs_unknown() -> Unavailable:
    """A request that only a signature makes readable, and none is known yet; a replica will tell it."""
    return Unavailable(
        "the model's inputs are not known before its first replica is ready", retry_after_s=RETRY_AFTER_S
    )


def json_refusal(output: str) -> BadRequest:
    """An output of a datatype that JSON cannot carry; Triton refuses it too."""
    return BadRequest(
        f"output {output!r}: {' and '.join(sorted(BINARY_ONLY))} cannot be sent as JSON; ask for binary data "
        "(parameter binary_data of the output, or binary_data_output of the request)"
    )
