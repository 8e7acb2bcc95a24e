"""Open Inference Protocol v2 over REST: JSON, and the binary tensor data extension, both directions.

A request is decoded once, against the Deployment's signature, into what an envelope carries: the batch
rows, the call key and each input's raw bytes. Errors name the tensor, what was expected and what came.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from tidegate.errors import BadRequest
from tidegate.protocol.envelope import Buffer, Tensor, call_key
from tidegate.protocol.models import Signature
from tidegate.protocol.tensors import DATATYPES, elements, from_json, string_offsets, to_json

HEADER_LENGTH = "Inference-Header-Content-Length"

# What tells this layer how to answer; the model does not see it.
_FOR_US = {"binary_data_output", "binary_data", "binary_data_size", "classification"}
# Triton's own request parameters; those that a queue cannot honour are refused.
_STATEFUL = {"sequence_id", "sequence_start", "sequence_end"}
_SHARED_MEMORY = {"shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"}

_KEYS_KEPT = 1024


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that the caller asked for, and how it wants it."""

    name: str
    binary: bool


class Decoded(NamedTuple):
    """A request, decoded. ``wanted`` None: every output; ``binary`` is the default form of outputs."""

    id: str
    rows: int
    key: bytes
    data: list[Buffer]
    wanted: tuple[WantedOutput, ...] | None
    binary: bool


@dataclass(slots=True)
class Contract:
    """A signature made ready for checking requests; None: anything goes, the model server decides."""

    signature: Signature | None
    inputs: dict[str, tuple[int, Tensor]] = field(init=False, default_factory=dict)
    outputs: frozenset[str] = field(init=False, default=frozenset())
    max_batch: int = field(init=False, default=0)
    _keys: dict[Any, bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.signature is None:
            return
        for at, spec in enumerate(self.signature.inputs):
            tensor = Tensor(spec.name, DATATYPES[spec.datatype], tuple(spec.shape))
            self.inputs[spec.name] = (at, tensor)
        self.outputs = frozenset(spec.name for spec in self.signature.outputs)
        self.max_batch = self.signature.max_batch_size

    def key(self, inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any]) -> bytes:
        """The call key; the same shapes come again and again, so it is made once for each."""
        if parameters:
            return call_key(inputs, outputs, parameters)
        known = self._keys.get((inputs, outputs))
        if known is None:
            if len(self._keys) >= _KEYS_KEPT:
                self._keys.clear()
            known = self._keys[(inputs, outputs)] = call_key(inputs, outputs, parameters)
        return known


def decode(body: bytes, header_length: int | None, contract: Contract) -> Decoded:
    """Decode and check a request body; raises BadRequest.

    ``header_length`` is the size of the JSON part when binary tensor data follows it, else None.
    """
    head, tail = _parts(body, header_length)
    parameters = _parameters(head.get("parameters"), "request")
    wanted = _wanted(head.get("outputs"), bool(parameters.get("binary_data_output", False)), contract)
    tensors, data, rows = _inputs(head.get("inputs"), tail, contract)
    names = tuple(output.name for output in wanted) if wanted else ()
    for_model = {k: v for k, v in parameters.items() if k not in _FOR_US}
    id_ = head.get("id", "")
    if not isinstance(id_, str):
        raise BadRequest(f"'id' must be a string, got {type(id_).__name__}")
    return Decoded(
        id_,
        rows,
        contract.key(tensors, names, for_model),
        data,
        wanted,
        bool(parameters.get("binary_data_output", False)),
    )


def _parts(body: bytes, header_length: int | None) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(body)
    size = len(view) if header_length is None else header_length
    if not 0 <= size <= len(view):
        raise BadRequest(f"{HEADER_LENGTH} is {size}, but the body has {len(view)} bytes")
    try:
        head = orjson.loads(view[:size])
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the request is not JSON: {error}") from None
    if not isinstance(head, dict):
        raise BadRequest("the request must be a JSON object with 'inputs'")
    return head, view[size:]


def _parameters(found: Any, where: str) -> dict[str, Any]:
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


def _wanted(found: Any, binary: bool, contract: Contract) -> tuple[WantedOutput, ...] | None:
    if not found:
        return None
    if not isinstance(found, list):
        raise BadRequest("'outputs' must be a list")
    wanted = []
    for output in found:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            raise BadRequest("every requested output needs a 'name'")
        if contract.outputs and name not in contract.outputs:
            raise BadRequest(f"output {name!r} does not exist; the model gives {sorted(contract.outputs)}")
        parameters = _parameters(output.get("parameters"), f"output {name!r}")
        if parameters.get("classification"):
            raise BadRequest(f"output {name!r}: the classification parameter is not supported")
        wanted.append(WantedOutput(name, bool(parameters.get("binary_data", binary))))
    return tuple(wanted)


def _inputs(found: Any, tail: memoryview, contract: Contract) -> tuple[tuple[Tensor, ...], list[Buffer], int]:
    if not isinstance(found, list) or not found:
        raise BadRequest(
            f"'inputs' must be a list of tensors; the model takes {sorted(contract.inputs) or 'any'}"
        )
    slots: list[tuple[int, Tensor, Buffer]] = []
    seen: set[str] = set()
    rows = -1
    at = 0
    for order, item in enumerate(found):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise BadRequest(f"inputs[{order}]: needs a 'name'")
        name = item["name"]
        if name in seen:
            raise BadRequest(f"input {name!r} is given twice")
        seen.add(name)
        shape = _shape(name, item.get("shape"))
        slot, datatype, dims, batch = _checked(name, item.get("datatype"), shape, order, contract)
        if rows not in (-1, batch):
            raise BadRequest(f"input {name!r}: batch size {batch}, but the inputs before it have {rows}")
        rows = batch
        size = _parameters(item.get("parameters"), f"input {name!r}").get("binary_data_size")
        raw: Buffer
        if size is None:
            if not isinstance(item.get("data"), list):
                raise BadRequest(f"input {name!r}: needs 'data' as a list, or binary data")
            raw = from_json(name, datatype, shape, item["data"])
        else:
            raw, at = _binary(name, size, tail, at)
            check_size(name, datatype.name, shape, raw)
        slots.append((slot, Tensor(name, datatype, dims), raw))
    if at != len(tail):
        raise BadRequest(f"{len(tail)} bytes of binary data, but the inputs name {at}")
    missing = contract.inputs.keys() - seen
    if missing:
        raise BadRequest(
            f"missing input {', '.join(map(repr, sorted(missing)))}; the model takes {list(contract.inputs)}"
        )
    slots.sort(key=lambda entry: entry[0])
    return tuple(entry[1] for entry in slots), [entry[2] for entry in slots], max(rows, 0)


def _shape(name: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
        raise BadRequest(f"input {name!r}: 'shape' must be a list of sizes, got {shape!r}")
    return shape


def _checked(
    name: str, datatype: Any, shape: list[int], order: int, contract: Contract
) -> tuple[int, Any, tuple[int, ...], int]:
    """The tensor's slot, datatype, dims without the batch axis, and rows (0: no batch axis)."""
    if contract.signature is None:
        if datatype not in DATATYPES:
            raise BadRequest(f"input {name!r}: unknown datatype {datatype!r}; one of {sorted(DATATYPES)}")
        return order, DATATYPES[datatype], tuple(shape), 0
    if name not in contract.inputs:
        raise BadRequest(f"input {name!r} does not exist; the model takes {list(contract.inputs)}")
    slot, spec = contract.inputs[name]
    if datatype != spec.datatype.name:
        raise BadRequest(f"input {name!r}: expected datatype {spec.datatype.name}, got {datatype!r}")
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


def _binary(name: str, size: Any, tail: memoryview, at: int) -> tuple[memoryview, int]:
    if type(size) is not int or size < 0:
        raise BadRequest(f"input {name!r}: binary_data_size must be a number of bytes, got {size!r}")
    if at + size > len(tail):
        raise BadRequest(f"input {name!r}: binary_data_size {size} goes past the end of the body")
    return tail[at : at + size], at + size


def check_size(name: str, datatype: str, shape: list[int], raw: Buffer) -> None:
    """Raw bytes must be as many as datatype and shape say; raises BadRequest."""
    count, size = elements(shape), DATATYPES[datatype].size
    if size and len(raw) != count * size:
        raise BadRequest(f"input {name!r}: {datatype} {shape} needs {count * size} bytes, got {len(raw)}")
    if not size:
        try:
            found = len(string_offsets(raw, 1))
        except (ValueError, struct.error) as error:
            raise BadRequest(f"input {name!r}: the BYTES data is malformed: {error}") from None
        if found != count:
            raise BadRequest(f"input {name!r}: shape {shape} needs {count} elements, got {found}")


def encode(
    model: str,
    version: str,
    request: Decoded,
    rows: int,
    outputs: tuple[Tensor, ...],
    parameters: dict[str, Any],
    data: list[Buffer],
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON part when binary data follows (else None)."""
    forms = {w.name: w.binary for w in request.wanted} if request.wanted else {}
    items, tail = [], []
    for tensor, raw in zip(outputs, data, strict=True):
        shape = [rows, *tensor.dims] if rows else list(tensor.dims)
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype.name, "shape": shape}
        if forms.get(tensor.name, request.binary) or tensor.datatype.name == "FP16":
            item["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            item["data"] = to_json(tensor.datatype, raw)
        items.append(item)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": items}
    if request.id:
        answer["id"] = request.id
    if parameters:
        answer["parameters"] = parameters
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((head, *tail)), len(head)) if tail else (head, None)
