"""Decode and encode Open Inference Protocol v2 over REST: JSON and the binary tensor data extension.

A request is checked against the Deployment's signature and decoded into the parts of an envelope: the number
of rows, the call key and each input's raw bytes. Errors name the tensor, the expected value and the received
value.
"""

from __future__ import annotations

import json
import struct
from math import prod
from typing import Any

import orjson

from services.gateway.domain.classification import Labels, classified
from services.gateway.domain.contract import (
    Beside,
    Contract,
    Decoded,
    Inputs,
    WantedOutput,
    check_name,
    check_parameters,
    check_shape,
    check_size,
    inputs_unknown,
    json_refusal,
    options,
)
from services.gateway.domain.shared_memory import REGION, Regions, Sink, part_of
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.envelope import Buffer, Tensor
from tidegate.kernel.protocol.tensors import BINARY_ONLY, Datatype, from_json, to_json

HEADER_LENGTH = "Inference-Header-Content-Length"
_MAX_STRING = 2**32 - 1


def decode(
    body: Buffer, header_length: int | None, contract: Contract, beside: Beside | None = None
) -> Decoded:
    """Decode and check a request body; raise BadRequest if it is invalid.

    ``header_length``: the number of bytes of JSON at the start of the body, if binary tensor data follows the
    JSON. None: the whole body is JSON. 0: the whole body is the data of the model's only input. For 0, raise
    Unavailable if the model's signature is not known.

    ``beside``: the parts of the request that are not in its body. If there is no ``beside``, or if it has no
    regions, raise UsesRegions for a tensor in shared memory.
    """
    head, tail = parts(body, header_length)
    return decode_head(head, tail, contract, beside)


def decode_head(
    head: dict[str, Any] | None, tail: memoryview, contract: Contract, beside: Beside | None = None
) -> Decoded:
    """Decode the result of :func:`parts`; raise the same errors as :func:`decode`. Ignore unknown fields."""
    if head is None:
        return _raw(tail, contract)
    parameters = check_parameters(head.get("parameters"), "request")
    binary = bool(parameters.get("binary_data_output", False))
    regions = None if beside is None else beside.regions
    sinks: dict[str, Sink] | None = None if regions is None else {}
    wanted = None
    if outputs := head.get("outputs"):
        wanted = _wanted(outputs, binary, contract, regions, sinks)
    else:
        contract.want_all(binary)
    tensors, data, rows = _inputs(head.get("inputs"), tail, contract, regions)
    names = tuple(output.name for output in wanted) if wanted else ()
    for_model, timeout_ms, priority, sequence = options(parameters, beside)
    id_ = head.get("id", "")
    if not isinstance(id_, str):
        raise BadRequest(f"'id' must be a string, got {type(id_).__name__}")
    key = contract.key(tensors, names, for_model)
    return Decoded(id_, rows, key, data, wanted, binary, timeout_ms, priority, sinks, sequence)


def parts(body: Buffer, header_length: int | None) -> tuple[dict[str, Any] | None, memoryview]:
    """Return the JSON object of a body (None without JSON) and the binary tensor data after it.

    Raise BadRequest if the body is malformed, and PayloadTooLarge if the JSON has too many values.
    """
    view = memoryview(body)
    if header_length == 0:
        return None, view
    size = len(view) if header_length is None else header_length
    if not 0 <= size <= len(view):
        raise BadRequest(
            f"inference header size should be in range (0, {len(view)}), got: {size}: {HEADER_LENGTH} must "
            "be the number of bytes of the body that are JSON"
        )
    try:
        head = bounded_json.loads(view[:size])
    except BadRequest as error:
        raise BadRequest(f"failed to parse the request JSON buffer: {error.message}") from None
    if not isinstance(head, dict):
        raise BadRequest("Unable to parse 'inputs': the request must be a JSON object with 'inputs'")
    return head, view[size:]


def request_parameters(body: Buffer, header_length: int | None) -> dict[str, Any]:
    """Return the parameters of a request; raise BadRequest if the request is malformed."""
    head, _ = parts(body, header_length)
    return {} if head is None else check_parameters(head.get("parameters"), "request")


def _wanted(
    outputs: Any,
    binary: bool,
    contract: Contract,
    regions: Regions | None,
    sinks: dict[str, Sink] | None,
) -> tuple[WantedOutput, ...]:
    if not isinstance(outputs, list):
        raise BadRequest("Unable to parse 'outputs': it must be a list")
    wanted = []
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(name, str):
            raise BadRequest("Unable to parse 'name': every requested output needs a name")
        check_name("output", name)
        parameters = check_parameters(
            output.get("parameters"), f"output {name!r}", in_memory=regions is not None
        )
        if regions is not None and sinks is not None:
            parameters = sink_of(name, parameters, regions, sinks)
        wanted.append(contract.want(name, binary, parameters))
    return tuple(wanted)


def sink_of(
    name: str, parameters: dict[str, Any], regions: Regions, sinks: dict[str, Sink]
) -> dict[str, Any]:
    """Add an output to ``sinks`` if the caller wants it in shared memory.

    Return the output's parameters for ``Contract.want``.
    """
    part = part_of(name, parameters)
    if part is None:
        return parameters
    if parameters.get("classification"):
        raise BadRequest("Output can't set both 'shared_memory_region' and 'classification'")
    sinks[name] = regions.sink(part)
    return {**parameters, "binary_data": True}


def _inputs(
    items: Any, tail: memoryview, contract: Contract, regions: Regions | None
) -> tuple[tuple[Tensor, ...], list[Buffer], int]:
    if not isinstance(items, list):
        raise BadRequest(
            f"Unable to parse 'inputs': it must be a list of tensors; the model takes "
            f"{sorted(contract.inputs) or 'any'}"
        )
    inputs = Inputs(contract)
    at = 0
    for order, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise BadRequest(f"Unable to parse 'name': inputs[{order}] needs a name")
        name = item["name"]
        check_name("input", name)
        shape = check_shape(name, item.get("shape"))
        datatype = inputs.expect(name, item.get("datatype"), shape)
        given = item.get("parameters")
        parameters = (
            {} if given is None else check_parameters(given, f"input {name!r}", in_memory=regions is not None)
        )
        size = parameters.get("binary_data_size")
        raw: Buffer
        if regions is not None and (part := part_of(name, parameters)) is not None:
            if size is not None or "data" in item:
                raise _one_place(name, item, parameters)
            raw = regions.read(part)
            check_size(name, datatype, shape, raw, contract.model)
        elif size is None:
            if not isinstance(item.get("data"), list):
                raise _one_place(name, item, parameters)
            try:
                raw = from_json(name, datatype, shape, item["data"])
            except BadRequest as error:
                raise BadRequest(f"Unable to parse 'data': {error.message}") from None
        else:
            raw, at = _binary(name, size, tail, at, contract.model)
            check_size(name, datatype, shape, raw, contract.model)
        inputs.put(raw)
    if at != len(tail):
        raise BadRequest(
            f"unexpected additional input data for model {contract.model!r}: got {len(tail)} bytes of binary "
            f"data, but the inputs declare {at}"
        )
    return inputs.done()


def _one_place(name: str, item: dict[str, Any], parameters: dict[str, Any]) -> BadRequest:
    """Return the error for an input with no data, data in two places, or ``data`` that is no list."""
    given = (("data" in item, "data"), *((each in parameters, each) for each in ("binary_data_size", REGION)))
    found = " ".join(repr(each) for there, each in given if there)
    return BadRequest(
        "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
        f"'shared_memory_region' in 'parameters'. But {f'set {found}' if found else 'no field is set'} "
        f"for input {name!r}. 'data' must be a list"
    )


def _binary(name: str, size: Any, tail: memoryview, at: int, model: str) -> tuple[memoryview, int]:
    if type(size) is not int or size < 0:
        raise BadRequest(
            f"input {name!r}: binary_data_size must be a number of bytes, got {bounded_json.shown(size)}"
        )
    if at + size > len(tail):
        raise BadRequest(
            f"unexpected size for input {name!r}, expecting {at + size - len(tail)} additional bytes for "
            f"model {model!r}: binary_data_size {size} goes past the end of the body"
        )
    return tail[at : at + size], at + size


def _raw(body: memoryview, contract: Contract) -> Decoded:
    """Decode Triton's raw binary request: the body is the model's only input, and outputs are binary.

    If the model batches, the body is one row. At most one dimension of the shape may be variable (-1).
    """
    if contract.signature is None:
        raise inputs_unknown()
    if len(contract.inputs) != 1:
        raise BadRequest(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(contract.inputs)} "
            f"inputs in {contract.model!r} model configuration: {HEADER_LENGTH} is 0, so the body must be "
            f"the only input, but the model takes {list(contract.inputs)}"
        )
    ((name, (_, spec)),) = contract.inputs.items()
    shape = [1, *spec.dims] if contract.max_batch else list(spec.dims)
    if shape.count(-1) > 1:
        raise BadRequest(
            f"The shape of the raw input {name!r} can not be deduced because there are more than one "
            "variable-sized dimension: a raw body can determine only one variable dimension (-1), but "
            f"{shape} has more"
        )
    raw: Buffer = body
    if spec.datatype.size:
        shape = _closed(name, spec.datatype, shape, len(body))
    else:
        raw = _one_string(name, shape, body)
    inputs = Inputs(contract)
    inputs.expect(name, spec.datatype.name, shape)
    inputs.put(raw)
    tensors, data, rows = inputs.done()
    return Decoded("", rows, contract.key(tensors, (), {}), data, None, True)


def _closed(name: str, datatype: Datatype, shape: list[int], size: int) -> list[int]:
    """Return a shape with its variable dimension (-1) computed from the ``size`` of the data in bytes."""
    each, is_open = prod(d for d in shape if d != -1) * datatype.size, -1 in shape
    if (size % each) if is_open and each else size != each:
        many = "a multiple of " if is_open else ""
        raise BadRequest(f"input {name!r}: {datatype.name} {shape} needs {many}{each} bytes, got {size}")
    return [size // max(each, 1) if d == -1 else d for d in shape]


def _one_string(name: str, shape: list[int], body: memoryview) -> bytes:
    """Return the body as the only element of a BYTES input of ``shape``.

    Raise BadRequest if ``shape`` does not have exactly one element, or if the body is too long.
    """
    if -1 in shape or prod(shape) != 1:
        raise BadRequest(
            f"For BYTE datatype raw input {name!r}, the model must have input shape [1]: a raw body is one "
            f"element of BYTES, but the shape is {shape}"
        )
    if len(body) > _MAX_STRING:
        raise BadRequest(f"input {name!r}: an element of BYTES may have at most {_MAX_STRING} bytes")
    return b"".join((struct.pack("<I", len(body)), body))


def encode(
    model: str,
    version: str,
    request: Decoded,
    rows: int,
    outputs: tuple[Tensor, ...],
    parameters: dict[str, Any],
    data: list[Buffer],
    labels: Labels | None = None,
) -> tuple[bytes, list[Buffer]]:
    """Return the JSON of a response, and the tensors that follow the JSON as binary data.

    Write an output to shared memory if the request wants it there. ``labels``: for each output, the names of
    its classes. Raise BadRequest for an output that cannot be sent as requested.
    """
    forms: dict[str, bool] = {}
    if request.wanted:
        outputs, data = classified(request, rows, outputs, data, labels or {})
        forms = {w.name: w.binary for w in request.wanted}
    items: list[dict[str, Any]] = []
    tail: list[Buffer] = []
    for tensor, raw in zip(outputs, data, strict=True):
        shape = [rows, *tensor.dims] if rows else list(tensor.dims)
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype.name, "shape": shape}
        values = None if forms.get(tensor.name, request.binary) else _values(tensor, raw)
        if values is None and request.sinks and (sink := request.sinks.get(tensor.name)) is not None:
            sink.write(tensor.name, raw)
            item["parameters"] = sink.part.parameters(len(raw))
        elif values is None:  # binary was requested, or the strings are not UTF-8
            item["parameters"] = {"binary_data_size": len(raw)}
            if len(raw):  # if no output has bytes, the response is plain JSON, as in Triton
                tail.append(raw)
        else:
            item["data"] = values
        items.append(item)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": items}
    if request.id:
        answer["id"] = request.id
    if parameters:
        answer["parameters"] = parameters
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in head:
        # orjson writes NaN and infinities as null, but Triton's clients expect the words NaN and Infinity. So
        # encode again with ``json``, which writes these words.
        head = json.dumps(answer, separators=(",", ":"), default=lambda array: array.tolist()).encode()
    return head, tail


def _values(tensor: Tensor, raw: Buffer) -> Any:
    if tensor.datatype.name in BINARY_ONLY:
        raise json_refusal(tensor.name)
    return to_json(tensor.datatype, raw)
