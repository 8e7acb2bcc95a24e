"""Triton's generate extension: in requests and answers, each tensor is a member of a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import orjson

from services.gateway.domain.contract import (
    Contract,
    Decoded,
    Inputs,
    check_parameters,
    inputs_unknown,
    options,
)
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import Datatype, from_json, unpack_strings

_RESERVED = frozenset({"id", "parameters"})


def decode(body: Buffer, contract: Contract) -> Decoded:
    """Decode a body and check it against the model's signature; raise BadRequest.

    Raise Unavailable if the signature is not known. A member with the name of an input is a tensor. Its shape
    follows from the signature and the values; its batch size is 1. Other members, and the members of
    ``parameters``, are parameters for the model.
    """
    if contract.signature is None:
        raise inputs_unknown()
    members = _members(body)
    parameters = check_parameters(members.get("parameters"), "request")
    inputs, extra = Inputs(contract), {}
    for name, value in members.items():
        if name in contract.inputs:
            _put(inputs, contract, name, value)
        elif name not in _RESERVED:
            extra[name] = value
    for_model, timeout_ms, priority, sequence = options(check_parameters(extra, "request") | parameters)
    tensors, data, rows = inputs.done()
    id_ = members.get("id", "")
    if not isinstance(id_, str):
        raise BadRequest(f"'id' must be a string, got {type(id_).__name__}")
    key = contract.key(tensors, (), for_model)
    return Decoded(id_, rows, key, data, None, False, timeout_ms, priority, sequence=sequence)


def request_parameters(body: Buffer) -> dict[str, Any]:
    """Return the members of a request together with the members of its ``parameters``.

    Raise BadRequest if the body or its ``parameters`` are not a JSON object.
    """
    members = _members(body)
    return members | check_parameters(members.get("parameters"), "request")


def encode(
    model: str,
    version: str,
    id: str,
    outputs: Sequence[Tensor],
    parameters: dict[str, Any],
    data: Sequence[Buffer],
) -> bytes:
    """Return an answer as JSON: each output is a single value or a flat list."""
    answer: dict[str, Any] = {"id": id} if id else {}
    answer |= {"model_name": model, "model_version": version} | parameters
    for tensor, raw in zip(outputs, data, strict=True):
        values = _values(tensor.datatype, raw)
        answer[tensor.name] = values[0] if len(values) == 1 else values
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _members(body: Buffer) -> dict[str, Any]:
    try:
        members = bounded_json.loads(body)
    except BadRequest as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {error.message}") from None
    if not isinstance(members, dict):
        raise BadRequest("the request must be a JSON object with a member for each input")
    return members


def _put(inputs: Inputs, contract: Contract, name: str, value: Any) -> None:
    _, tensor = contract.inputs[name]
    dims = fitting(name, tensor.dims, value)
    shape = [1, *dims] if contract.max_batch else dims
    datatype = inputs.expect(name, tensor.datatype.name, shape)
    inputs.put(from_json(name, datatype, shape, value if isinstance(value, list) else [value]))


def fitting(name: str, dims: tuple[int, ...], value: Any) -> list[int]:
    """Return the shape of a value (scalar or nested list) for an input with the shape ``dims``.

    A dim of -1 may have any size. If the nesting of the value matches ``dims``, return the value's own shape.
    Otherwise, only the number of values must fit. In this case, return ``dims`` with a size in place of each
    -1, so that the shape has as many elements as there are values. Raise BadRequest if the number of values
    does not fit.
    """
    sizes = _sizes(value)
    if len(sizes) == len(dims) and all(want in (-1, size) for want, size in zip(dims, sizes, strict=True)):
        return sizes
    count, known = prod(sizes), prod(dim for dim in dims if dim != -1)
    free = dims.count(-1)
    if free > 1:
        fits, size = count == known, 1
    elif free == 1:
        fits, size = known > 0 and count % known == 0, count // max(known, 1)
    else:
        fits, size = count == known, 0
    if not fits:
        raise BadRequest(f"input {name!r}: {count} values cannot fill the shape {list(dims)}")
    return [size if dim == -1 else dim for dim in dims]


def _sizes(value: Any) -> list[int]:
    sizes = []
    while isinstance(value, list):
        sizes.append(len(value))
        value = value[0] if value else None
    return sizes


def _values(datatype: Datatype, raw: Buffer) -> Any:
    if datatype.name == "BYTES":
        return [element.decode("utf-8", "replace") for element in unpack_strings(raw)]
    if datatype.name == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    values = np.frombuffer(raw, datatype.numpy)
    return values.astype("<f4") if datatype.name == "FP16" else values
