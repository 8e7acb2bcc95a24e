"""Check requests against a model's signature. JSON, binary and protobuf requests get the same checks.

The codecs (``oip.py`` and ``generate.py`` for REST, ``api/grpc/codec.py`` for gRPC) parse a request and call
these checks. Errors name the tensor, the expected value and the received value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any, NamedTuple

from services.gateway.domain.sequences import sequence_of
from services.gateway.domain.shared_memory import OFFSET, REGION, SIZE, Regions, Sink, UsesRegions
from tidegate.kernel.errors import BadRequest, Unavailable
from tidegate.kernel.protocol.bounded_json import shown
from tidegate.kernel.protocol.envelope import KEPT_KEY, LAST_PRIORITY, MAX_KEY, Buffer, Tensor, call_key
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.sequences import PARAMETERS, SequenceMark
from tidegate.kernel.protocol.tensors import (
    BINARY_ONLY,
    DATATYPES,
    MAX_STRINGS,
    Datatype,
    check_count,
    count_strings,
    elements,
)

# The gateway itself uses these parameters: to decode tensors, to encode outputs and to queue requests. They
# are not sent to the model.
_FOR_US = frozenset({"binary_data_output", "binary_data", "binary_data_size", "classification"})
_FOR_THE_QUEUE = frozenset({"timeout", "priority"})
# Triton's parameters for tensors in shared memory.
_SHARED_MEMORY = {REGION, OFFSET, SIZE}

_KEYS_KEPT = 1024
# The format of the call key sets these limits; see tidegate.kernel.protocol.envelope.
_MAX_NAME, _MAX_DIMS, _MAX_DIM = 255, 255, 2**63 - 1
_MAX_INT = 2**63
RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that the caller wants.

    ``classes``: how many of the most likely classes to return instead of the values. 0 means: return the
    values.
    """

    name: str
    binary: bool
    classes: int = 0


class Decoded(NamedTuple):
    """A decoded request.

    ``wanted``: the requested outputs; None means all outputs. ``binary``: True if outputs are binary by
    default. ``timeout_ms``: the timeout in the request, or None. ``priority``: 1 is the highest; 0 means that
    none was set. ``sinks``: for each output that goes to shared memory, its address there. ``sequence``: the
    sequence that the request belongs to, or None.
    """

    id: str
    rows: int
    key: bytes
    data: list[Buffer]
    wanted: tuple[WantedOutput, ...] | None
    binary: bool
    timeout_ms: float | None = None
    priority: int = 0
    sinks: Mapping[str, Sink] | None = None
    sequence: SequenceMark | None = None

    def without_data(self) -> Decoded:
        """Return the request without its tensors. This is quicker than ``_replace``."""
        id_, rows, key, _, wanted, binary, timeout_ms, priority, sinks, sequence = self
        return Decoded(id_, rows, key, [], wanted, binary, timeout_ms, priority, sinks, sequence)


class Beside(NamedTuple):
    """The parts of a request that are not in its body.

    ``regions``: the caller's shared memory. ``forwarded``: headers that go to the model as parameters.
    """

    regions: Regions | None = None
    forwarded: Mapping[str, str] = MappingProxyType({})


class Options(NamedTuple):
    """A request's parameters, separated into those for the model and those for the queue."""

    for_model: dict[str, Any]
    timeout_ms: float | None = None
    priority: int = 0
    sequence: SequenceMark | None = None


_NO_OPTIONS = Options({})


@dataclass(slots=True)
class Contract:
    """A signature, prepared for checks of requests. Without a signature, Triton checks the tensors.

    ``model``: the model's name for error messages. Error messages begin with Triton's own words, because
    programs that were written for Triton recognize errors by these words.
    """

    signature: Signature | None
    model: str = ""
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
        """Return True if a request needs no input.

        This is so if all inputs are optional and the model does not batch.
        """
        return self.signature is not None and not self.required and not self.max_batch

    def key(self, inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
        """Return the call key: the encoded names, shapes and parameters of a request.

        Raise BadRequest if the key is too large. Keys without parameters are cached, because many requests
        have the same shapes.
        """
        cached = None if parameters else self._keys.get((inputs, outputs))
        if cached is not None:
            return cached
        key = _bounded(inputs, outputs, parameters)
        if not parameters and len(key) <= KEPT_KEY:
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            self._keys[(inputs, outputs)] = key
        return key

    def want(self, name: str, binary: bool, parameters: dict[str, Any]) -> WantedOutput:
        """Check a requested output and return it. Raise BadRequest if it is invalid."""
        if self.outputs and name not in self.outputs:
            raise BadRequest(
                f"unexpected inference output {name!r} for model {self.model!r}: it returns "
                f"{sorted(self.outputs)}"
            )
        check_name("output", name)
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise BadRequest(
                f"invalid value for 'classification' parameter, expected >= 0: output {name!r} has "
                f"{shown(classes)}, which is not a number of classes"
            )
        binary = bool(parameters.get("binary_data", binary))
        if name in self.binary_only and not (binary or classes):
            raise json_refusal(name)
        return WantedOutput(name, binary, classes)

    def want_all(self, binary: bool) -> None:
        """Raise BadRequest if ``binary`` is False and JSON cannot represent one of the outputs."""
        if self.binary_only and not binary:
            raise json_refusal(min(self.binary_only))


class Inputs:
    """Check and collect the inputs of one request.

    The calling code must call ``expect`` and then ``put`` for each input. At the end, it must call ``done``.
    """

    __slots__ = ("_contract", "_datatype", "_dims", "_seen", "_shape", "_slot", "_slots", "name", "rows")

    def __init__(self, contract: Contract) -> None:
        self._contract = contract
        self._slots: list[tuple[int, Tensor, Buffer]] = []
        self._seen: set[str] = set()
        self.rows = -1

    def expect(self, name: str, datatype: Any, shape: list[int]) -> Datatype:
        """Check the description of the next input; return the datatype of its data.

        Raise BadRequest if the description does not fit the signature or the inputs before it.
        """
        if name in self._seen:
            raise BadRequest(f"input {name!r} already exists in request: send each input once")
        self._slot, self._datatype, self._dims, rows = _checked(
            name, datatype, shape, len(self._seen), self._contract
        )
        self._seen.add(name)
        if self.rows not in (-1, rows):
            raise BadRequest(
                f"input {name!r} batch size does not match other inputs for {self._contract.model!r}: this "
                f"input has {rows} rows, but the inputs before it have {self.rows}"
            )
        self.name, self.rows = name, rows
        return self._datatype

    def put(self, raw: Buffer) -> None:
        """Set the raw bytes of the input that :meth:`expect` checked last."""
        self._slots.append((self._slot, Tensor(self.name, self._datatype, self._dims), raw))

    def done(self) -> tuple[tuple[Tensor, ...], list[Buffer], int]:
        """Return tensors and data in the signature's order, and the number of rows.

        Raise BadRequest if inputs are missing.
        """
        contract, slots = self._contract, self._slots
        if not slots and not contract.required and not contract.may_be_empty:
            raise BadRequest(
                f"'inputs' must be a list of tensors; the model takes {sorted(contract.inputs) or 'any'}"
            )
        if missing := contract.required - self._seen:
            raise BadRequest(
                f"expected {len(contract.required)} inputs but got {len(slots)} inputs for model "
                f"{contract.model!r}. Got input(s) {_names(self._seen)}, but missing required input(s) "
                f"{_names(missing)}. Please provide all required input(s)."
            )
        if len(slots) == 1:  # most requests have one input, which needs no sorting
            _, tensor, raw = slots[0]
            return (tensor,), [raw], max(self.rows, 0)
        slots.sort(key=lambda entry: entry[0])
        return tuple(entry[1] for entry in slots), [entry[2] for entry in slots], max(self.rows, 0)


def _bounded(inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
    names = len(inputs) + len(outputs)
    if len(set(outputs)) < len(outputs):
        (twice, _), *_ = Counter(outputs).most_common(1)
        raise BadRequest(f"Duplicate output name {twice!r} is not allowed in a request: send each name once")
    size = 2 * names  # the key has at least 2 bytes per name; call_key fails for more than 65,535 names
    if size <= MAX_KEY:
        key = call_key(inputs, outputs, parameters)
        if len(key) <= MAX_KEY:
            return key
        size = len(key)
    raise BadRequest(
        f"the names, shapes and parameters of {names} tensors have {size} bytes in total, but the limit is "
        f"{MAX_KEY}: send large values as tensors"
    )


def check_parameters(parameters: Any, where: str, *, in_memory: bool = False) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output.

    Raise BadRequest if the parameters are not an object. ``in_memory``: True if the tensor may be in shared
    memory. If it is False, raise UsesRegions for a tensor in shared memory. ``where``: the name of the
    request, input or output in error messages.
    """
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise BadRequest(f"{where}: 'parameters' must be an object")
    if not in_memory and not parameters.keys().isdisjoint(_SHARED_MEMORY):
        raise UsesRegions(where)
    return parameters


def is_ours(name: str) -> bool:
    """Return True if Tidegate or Triton uses a parameter of this name.

    A forwarded header must not have such a name.
    """
    return name in _FOR_US | _FOR_THE_QUEUE | PARAMETERS or name.startswith("triton_")


def options(parameters: dict[str, Any], beside: Beside | None = None) -> Options:
    """Separate a request's parameters by purpose; raise BadRequest for an invalid parameter.

    The parameter ``timeout`` is in µs, as in Triton. The forwarded headers of ``beside`` also go to the
    model. If a header and a parameter have the same name, only the parameter goes to the model.
    """
    if not parameters and (beside is None or not beside.forwarded):
        return _NO_OPTIONS
    for_model: dict[str, Any] = {} if beside is None else dict(beside.forwarded)
    for name, value in parameters.items():
        if name in _FOR_US or name in PARAMETERS:
            continue
        if name in _FOR_THE_QUEUE:
            if type(value) is not int or not 0 <= value < _MAX_INT:
                raise BadRequest(
                    f"Unable to parse {shown(name)}: this parameter must be a whole number, 0 or more, got "
                    f"{shown(value)}"
                )
        elif name.startswith("triton_"):
            raise BadRequest(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
                f"specified. Rename {shown(name)}"
            )
        elif not isinstance(value, str | int | float):
            raise BadRequest(
                f"parameter {shown(name)} has invalid type. It should be either 'int', 'bool', or 'string'."
            )
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
    sequence = None if PARAMETERS.isdisjoint(parameters) else sequence_of(parameters)
    if sequence is not None:
        for_model |= sequence.parameters()
    return Options(for_model, timeout_us / 1e3 if timeout_us else None, priority, sequence)


def check_name(kind: str, name: str) -> None:
    """Raise BadRequest for a name that is too long.

    Errors and responses repeat names, so names must be short.
    """
    if len(name) > _MAX_NAME or (not name.isascii() and len(name.encode()) > _MAX_NAME):
        raise BadRequest(f"{kind} {shown(name)}: a name may have at most {_MAX_NAME} bytes")


def check_shape(name: str, shape: Any) -> list[int]:
    """Check a tensor's shape (with the batch axis) and return it. Raise BadRequest if it is invalid."""
    if not isinstance(shape, list):
        raise _no_shape(name, shape)
    if len(shape) > _MAX_DIMS:
        raise BadRequest(f"input {name!r} has {len(shape)} dimensions, but the limit is {_MAX_DIMS}")
    for size in shape:  # most shapes are short, and for them a loop is quicker than a generator
        if type(size) is not int or not 0 <= size <= _MAX_DIM:
            raise _no_shape(name, shape)
    if elements(shape) > _MAX_DIM:
        raise BadRequest(
            f"input {name!r}: 'shape' causes total element count to exceed maximum size of {_MAX_DIM}"
        )
    return shape


def _no_shape(name: str, given: Any) -> BadRequest:
    return BadRequest(
        f"Unable to parse 'shape': input {name!r}: 'shape' must be a list of sizes, got {shown(given)}"
    )


def _checked(
    name: str, datatype: Any, shape: list[int], order: int, contract: Contract
) -> tuple[int, Datatype, tuple[int, ...], int]:
    """Return an input's position, its datatype, its dims without the batch axis, and its rows.

    The position is the input's index in the signature, or ``order`` if there is no signature. The number of
    rows is 0 if the shape has no batch axis. Raise BadRequest if the input does not fit the model.
    """
    if contract.signature is None:
        check_name("input", name)
        if not isinstance(datatype, str) or datatype not in DATATYPES:
            raise BadRequest(
                f"input {name!r}: unknown datatype {shown(datatype)}; expected one of {sorted(DATATYPES)}"
            )
        return order, DATATYPES[datatype], tuple(shape), 0
    if name not in contract.inputs:
        raise BadRequest(
            f"unexpected inference input {name!r} for model {contract.model!r}: it takes "
            f"{list(contract.inputs)}"
        )
    slot, spec = contract.inputs[name]
    if datatype != spec.datatype.name:
        if not isinstance(datatype, str):
            raise BadRequest(
                f"Unable to parse 'datatype': input {name!r} has {shown(datatype)}, but model "
                f"{contract.model!r} expects {spec.datatype.name!r}"
            )
        if datatype not in DATATYPES:
            raise BadRequest(
                f"invalid datatype for input {name}: {shown(datatype)}. Model {contract.model!r} expects "
                f"{spec.datatype.name!r}"
            )
        raise BadRequest(
            f"inference input {name!r} data-type is {shown(datatype)}, but model {contract.model!r} expects "
            f"{spec.datatype.name!r}"
        )
    batched = contract.max_batch > 0
    dims = tuple(shape[1:]) if batched else tuple(shape)
    fits = dims == spec.dims or (
        len(dims) == len(spec.dims) and all(e in (-1, d) for e, d in zip(spec.dims, dims, strict=True))
    )
    if not fits or (batched and not shape):
        expected = [-1, *spec.dims] if batched else list(spec.dims)
        raise BadRequest(
            f"unexpected shape for input {name!r} for model {contract.model!r}. Expected {_dims(expected)}, "
            f"got {_dims(shape)}." + (" The first dimension is the batch." if batched else "")
        )
    rows = shape[0] if batched else 0
    if batched and not 1 <= rows <= contract.max_batch:
        raise BadRequest(
            f"inference request batch-size must be <= {contract.max_batch} for {contract.model!r}: input "
            f"{name!r} has {rows} rows, and needs 1 to {contract.max_batch}"
        )
    return slot, spec.datatype, dims, rows


def _names(names: Iterable[str]) -> str:
    """Return names as Triton writes them."""
    return f"[{','.join(map(repr, sorted(names)))}]"


def _dims(shape: Sequence[int]) -> str:
    """Return a shape as Triton writes it."""
    return f"[{','.join(map(str, shape))}]"


def check_size(name: str, datatype: Datatype, shape: list[int], raw: Buffer, model: str) -> None:
    """Raise BadRequest if raw bytes do not fit the datatype and the shape. ``model``: the model's name."""
    count, size = elements(shape), datatype.size
    if size and len(raw) != count * size:
        raise BadRequest(
            f"input byte size mismatch for input {name!r} for model {model!r}. Expected {count * size}, got "
            f"{len(raw)}: {datatype.name} {shape}"
        )
    if not size:
        check_count(name, count)
        try:
            actual = count_strings(raw)
        except ValueError as error:
            raise BadRequest(
                f"input {name!r}: the BYTES data is malformed: {error}; each element must be its length "
                "(4 bytes, little-endian), followed by its bytes"
            ) from None
        if actual != count:
            got = actual if actual <= MAX_STRINGS else f"more than {MAX_STRINGS}"
            raise BadRequest(f"input {name!r}: shape {shape} needs {count} elements, got {got}")


def inputs_unknown() -> Unavailable:
    """Return the error for a request that cannot be decoded until the signature is known."""
    return Unavailable(
        "the model's inputs are not known until the first replica is ready", retry_after_s=RETRY_AFTER_S
    )


def json_refusal(output: str) -> BadRequest:
    """Return the error for an output with a datatype that JSON cannot represent.

    Triton also refuses to send such an output as JSON.
    """
    return BadRequest(
        f"output {output!r}: {' and '.join(sorted(BINARY_ONLY))} cannot be sent as JSON; request binary data "
        "(parameter binary_data of the output, or binary_data_output of the request)"
    )
