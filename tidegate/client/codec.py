"""Encode and decode the binary tensor extension of the Open Inference Protocol, with numpy arrays.

A body is a JSON head, followed by the raw bytes of the tensors. The bytes are in the order in which the head
lists the tensors. The HTTP header ``Inference-Header-Content-Length`` is the length of the head. Pure: no
I/O, no state.

BYTES tensors are object arrays. The elements of an input are ``bytes`` or ``str``, and the elements of an
output are ``bytes``. numpy does not have BF16, so BF16 tensors are float32 arrays. Inputs are rounded to the
nearest BF16, ties to even.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

HEAD_LENGTH = "Inference-Header-Content-Length"

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array. ``datatype``: its datatype in the protocol, for example ``FP32``."""

    name: str
    datatype: str
    array: Array


def dtype_of(datatype: str) -> np.dtype[Any]:
    """Return the numpy dtype for ``datatype``, in the machine's byte order."""
    if datatype == "BYTES":
        return np.dtype(object)
    if datatype == "BF16":
        return np.dtype(np.float32)
    return np.dtype(DATATYPES[datatype].numpy).newbyteorder("=")


_BY_DTYPE = {dtype_of(name): name for name in DATATYPES if name != "BF16"}


def datatype_of(array: Array) -> str:
    """Return the datatype of an array. Raise TypeError for a dtype that the protocol does not have."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    try:
        return _BY_DTYPE[array.dtype.newbyteorder("=")]
    except KeyError:
        raise TypeError(
            f"arrays of {array.dtype} cannot be sent; use one of {', '.join(DATATYPES)}"
        ) from None


def to_raw(array: Array, datatype: str) -> bytes:
    """Return the raw bytes of ``array``, whose dtype must be that of ``datatype``."""
    if datatype == "BYTES":
        return pack_strings(array.ravel().tolist())
    if datatype == "BF16":
        return _bf16(np.ascontiguousarray(array, dtype=np.float32)).tobytes()
    return np.ascontiguousarray(array, dtype=DATATYPES[datatype].numpy).tobytes()


def from_raw(raw: bytes | memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """Decode raw bytes to a new, writable array. Raise ValueError if they do not fill ``shape`` exactly."""
    if datatype == "BYTES":
        elements = unpack_strings(raw)
        if len(elements) != prod(shape):
            raise ValueError(f"{len(elements)} BYTES elements do not fill shape {list(shape)}")
        array = np.empty(len(elements), dtype=object)
        array[:] = elements
        return array.reshape(shape)
    if datatype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(shape)
    return np.frombuffer(raw, DATATYPES[datatype].numpy).reshape(shape).astype(dtype_of(datatype))


def _bf16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = array.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could turn a NaN into infinity. So do not round a NaN: keep its top bits and make it a quiet
    # NaN.
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(array), quiet, rounded).astype("<u2")


def encode_request(
    inputs: Sequence[Tensor],
    *,
    outputs: Sequence[str] | None = None,
    request_id: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[bytes, int]:
    """Return the body of an inference request, and the length of its head. The body requests binary outputs.

    ``extra`` has additional fields for the head.
    """
    blobs = [to_raw(tensor.array, tensor.datatype) for tensor in inputs]
    head: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.array.shape),
                "parameters": {"binary_data_size": len(blob)},
            }
            for tensor, blob in zip(inputs, blobs, strict=True)
        ],
        "parameters": dict(parameters or {}),
        **(extra or {}),
    }
    if request_id is not None:
        head["id"] = request_id
    if outputs is None:
        head["parameters"]["binary_data_output"] = True
    else:
        head["outputs"] = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    raw_head = orjson.dumps(head)
    return b"".join((raw_head, *blobs)), len(raw_head)


def decode_response(body: bytes, head_length: int | None) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the head and the outputs of an inference response.

    The outputs are arrays by name. Raise ValueError if the body is malformed. If ``head_length`` is None, the
    whole body is JSON. Each output is either binary or JSON.
    """
    view = memoryview(body)
    end = len(view) if head_length is None else head_length
    if end > len(view):
        raise ValueError(f"the head should have {end} bytes, but the whole body has {len(view)}")
    head = orjson.loads(view[:end])
    if not isinstance(head, dict):
        raise ValueError("the head is not a JSON object")
    arrays: dict[str, Array] = {}
    try:
        for output in head.get("outputs", []):
            size = output.get("parameters", {}).get("binary_data_size")
            if size is None:
                arrays[output["name"]] = from_json_output(output)
                continue
            arrays[output["name"]] = from_raw(view[end : end + size], output["datatype"], output["shape"])
            end += size
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an output is malformed: {error!r}") from None
    if end != len(view):
        raise ValueError(f"the body has {len(view) - end} bytes after the last output; expected none")
    return head, arrays


def to_json_input(tensor: Tensor) -> dict[str, Any]:
    """Return an input as JSON. Raise TypeError for datatypes and bytes that JSON cannot hold."""
    if tensor.datatype in {"FP16", "BF16"}:
        raise TypeError(
            f"input {tensor.name!r}: {tensor.datatype} cannot be sent as JSON, which this call needs"
        )
    data = tensor.array.ravel().tolist()
    if tensor.datatype == "BYTES":
        try:
            data = [item.decode() if isinstance(item, bytes) else item for item in data]
        except UnicodeDecodeError:
            raise TypeError(f"input {tensor.name!r}: the bytes are not UTF-8 text, as JSON needs") from None
    return {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": list(tensor.array.shape),
        "data": data,
    }


def from_json_output(output: dict[str, Any]) -> Array:
    """Return the array of a JSON output (``datatype``, ``shape``, ``data``)."""
    shape, datatype = output["shape"], output["datatype"]
    if datatype == "BYTES":
        flat = np.array(output["data"], dtype=object).ravel().tolist()
        elements = [item.encode() if isinstance(item, str) else bytes(item) for item in flat]
        array = np.empty(len(elements), dtype=object)
        array[:] = elements
        return array.reshape(shape)
    return np.array(output["data"], dtype=dtype_of(datatype)).reshape(shape)
