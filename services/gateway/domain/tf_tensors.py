"""Translate TensorFlow's tensors (``TensorProto``) to raw tensors of the inference protocol, and back. Pure.

A ``TensorProto`` has its values as bytes (``tensor_content``), or as elements of the list for its datatype,
such as ``float_val``. If the list has fewer values than the shape needs, TensorFlow repeats the last value.
An empty list means zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tidegate.kernel.errors import BadRequest, PayloadTooLarge
from tidegate.kernel.protocol.tensors import check_count, pack_strings, unpack_strings

Array = npt.NDArray[Any]


class Kind(NamedTuple):
    """A datatype: its name in the inference protocol, its NumPy type, and its list in ``TensorProto``."""

    name: str
    numpy: str
    values: str


# The datatypes, with the number of each in TensorFlow (``types.proto``) as the key.
KINDS = {
    1: Kind("FP32", "<f4", "float_val"),
    2: Kind("FP64", "<f8", "double_val"),
    3: Kind("INT32", "<i4", "int_val"),
    4: Kind("UINT8", "u1", "int_val"),
    5: Kind("INT16", "<i2", "int_val"),
    6: Kind("INT8", "i1", "int_val"),
    7: Kind("BYTES", "O", "string_val"),
    9: Kind("INT64", "<i8", "int64_val"),
    10: Kind("BOOL", "?", "bool_val"),
    14: Kind("BF16", "<u2", "half_val"),
    17: Kind("UINT16", "<u2", "int_val"),
    19: Kind("FP16", "<f2", "half_val"),
    22: Kind("UINT32", "<u4", "uint32_val"),
    23: Kind("UINT64", "<u8", "uint64_val"),
}
NUMBERS = {kind.name: number for number, kind in KINDS.items()}
_BITS = {"FP16", "BF16"}  # ``half_val`` holds their values as bit patterns
# In Protobuf's packed form, the lists of these datatypes have the same bytes as the raw tensor. So the raw
# tensor is copied into the message. Before it come the list's tag (the value in this dict) and the number
# of bytes.
_PACKED = {"FP32": 5 << 3 | 2, "FP64": 6 << 3 | 2, "BOOL": 11 << 3 | 2}
MAX_DIMS = 16


def raw_of(name: str, tensor: Any, most_bytes: int) -> tuple[str, list[int], bytes]:
    """Return the datatype, the shape and the raw bytes of a ``TensorProto``.

    ``most_bytes``: the largest size of the raw tensor in bytes. It is checked, because a short list can mean
    a large tensor. Raise PayloadTooLarge if the tensor is larger, and BadRequest if the tensor is wrong.
    """
    kind = KINDS.get(tensor.dtype)
    if kind is None:
        raise BadRequest(f"input {name!r}: TensorFlow's datatype {tensor.dtype} is not supported")
    shape = _shape(name, tensor.tensor_shape)
    count = math.prod(shape)
    if kind.name == "BYTES":
        return kind.name, shape, _strings(name, list(tensor.string_val), count, most_bytes)
    size = count * np.dtype(kind.numpy).itemsize
    _check_size(name, size, most_bytes)
    if content := tensor.tensor_content:
        if len(content) != size:
            raise BadRequest(
                f"input {name!r}: shape {shape} of {kind.name} needs {size} bytes, got {len(content)}"
            )
        return kind.name, shape, content
    values = getattr(tensor, kind.values)
    return kind.name, shape, _numbers(name, kind, values, count)


def proto_of(target: Any, datatype: str, shape: Sequence[int], raw: bytes) -> None:
    """Write a raw tensor to a ``TensorProto``. Raise BadRequest for a datatype that TensorFlow lacks.

    The values go into the list of the datatype, as in TensorFlow Serving, because some clients do not read
    ``tensor_content``.
    """
    number = NUMBERS.get(datatype)
    if number is None:
        raise BadRequest(f"TensorFlow has no datatype for {datatype}")
    target.dtype = number
    for size in shape:
        target.tensor_shape.dim.add(size=size)
    kind = KINDS[number]
    if datatype == "BYTES":
        target.string_val.extend(unpack_strings(raw))
    elif datatype in _PACKED:
        target.MergeFromString(bytes((_PACKED[datatype],)) + _varint(len(raw)) + raw)
    else:
        values = np.frombuffer(raw, "<u2" if datatype in _BITS else kind.numpy)
        getattr(target, kind.values).extend(values.tolist())


def columns(examples: Sequence[Mapping[str, Any]], datatypes: Mapping[str, str]) -> dict[str, Array]:
    """Return the inputs in examples (``tf.Example``): per feature, an array with a row per example.

    ``examples``: the features of each example by name. ``datatypes``: the datatype of each input of the
    model. Raise BadRequest if the examples differ in their features, or do not fit the model.
    """
    if not examples:
        raise BadRequest("the request has no examples")
    found = {}
    for name in examples[0]:
        if name not in datatypes:
            raise BadRequest(f"input {name!r} does not exist; the model takes {sorted(datatypes)}")
        rows = [_feature(each[name]) if name in each else [] for each in examples]
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise BadRequest(f"feature {name!r} must have the same number of values in every example")
        kind = KINDS[NUMBERS[datatypes[name]]] if datatypes[name] in NUMBERS else None
        if kind is None or not all(_holds(kind, row[0]) for row in rows):
            raise BadRequest(
                f"feature {name!r}: the model takes {datatypes[name]}, but the values are of another kind"
            )
        try:
            found[name] = np.array(rows, dtype=object if kind.name == "BYTES" else kind.numpy)
        except OverflowError:
            raise BadRequest(f"feature {name!r} has a value that does not fit into {kind.name}") from None
    if any(each.keys() != examples[0].keys() for each in examples):
        raise BadRequest(f"every example must have the features {sorted(examples[0])}")
    return found


def _holds(kind: Kind, value: Any) -> bool:
    """Return True if a datatype accepts a value. BF16 accepts none; integers accept no floats."""
    if kind.name in ("BYTES", "BF16"):
        return kind.name == "BYTES" and isinstance(value, bytes)
    return isinstance(value, int) or (isinstance(value, float) and np.dtype(kind.numpy).kind == "f")


def _feature(feature: Any) -> list[Any]:
    kind = next((each for each in ("bytes_list", "float_list", "int64_list") if feature.HasField(each)), None)
    return list(getattr(feature, kind).value) if kind else []


def _shape(name: str, shape: Any) -> list[int]:
    sizes = [each.size for each in shape.dim[: MAX_DIMS + 1]]
    if shape.unknown_rank or len(sizes) > MAX_DIMS or any(size < 0 for size in sizes):
        raise BadRequest(f"input {name!r}: expected a known shape with at most {MAX_DIMS} dimensions")
    return sizes


def _check_size(name: str, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise PayloadTooLarge(
            f"input {name!r} has {size} bytes, but only {most_bytes} are left of the limit for all inputs "
            "(TIDEGATE_MAX_BODY_BYTES)"
        )


def _strings(name: str, values: list[bytes], count: int, most_bytes: int) -> bytes:
    check_count(name, count)
    if len(values) != count:
        if len(values) > count or not values:
            raise BadRequest(f"input {name!r}: the shape needs {count} strings, got {len(values)}")
        _check_size(name, sum(map(len, values)) + (count - len(values)) * len(values[-1]), most_bytes)
        values += [values[-1]] * (count - len(values))
    return pack_strings(values)


def _numbers(name: str, kind: Kind, values: Any, count: int) -> bytes:
    if len(values) > count:
        raise BadRequest(f"input {name!r}: the shape needs {count} values, got {len(values)}")
    try:
        given = np.asarray(values, dtype="<u2" if kind.name in _BITS else kind.numpy)
    except (OverflowError, ValueError):
        raise BadRequest(f"input {name!r} has a value that does not fit into {kind.name}") from None
    if len(given) == count:
        return given.tobytes()
    full = np.zeros(count, dtype=given.dtype)
    full[: len(given)] = given
    if len(given):
        full[len(given) :] = given[-1]
    return full.tobytes()


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))
