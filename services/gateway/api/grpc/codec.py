"""Decode ``ModelInferRequest`` for the core, and encode the core's result as ``ModelInferResponse``."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

from services.gateway.application.inference.core import InferenceResult
from services.gateway.domain.classification import Labels, classified
from services.gateway.domain.contract import (
    Beside,
    Contract,
    Decoded,
    Inputs,
    WantedOutput,
    check_parameters,
    check_shape,
    check_size,
    options,
)
from services.gateway.domain.oip import sink_of
from services.gateway.domain.shared_memory import Regions, Sink, part_of
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.tensors import Datatype, check_count, elements, misfit, pack_strings
from tidegate.kernel.triton_protocol import ModelInferResponse

# If a request in a stream has this parameter, an extra response without outputs follows its last answer.
EMPTY_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"

# `check_shape` is called only for a shape that is empty, has a negative size, or has more dimensions than
# this. This saves time for normal shapes.
MANY_DIMS = 16
# Read at most this many dimensions of a shape. A shape with more dimensions is always an error.
MOST_DIMS = 1024

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# For these datatypes, the packed protobuf field has the same bytes as the raw tensor, so these bytes are used
# as they are. The value is the tag of the field.
_RAW_ON_THE_WIRE = {"FP32": 6 << 3 | 2, "FP64": 7 << 3 | 2}


def decode(message: Any, contract: Contract, beside: Beside | None = None) -> Decoded:
    """Decode a ``ModelInferRequest``, and check it against the signature in ``contract``.

    ``beside``: the parts of the request that are not in its body.

    Raise BadRequest if the request is invalid. Raise UsesRegions if a tensor is in shared memory and
    ``beside`` gives no regions.
    """
    regions = None if beside is None else beside.regions
    sinks: dict[str, Sink] | None = None if regions is None else {}
    parameters = _parameters(message.parameters, "request")
    parameters.pop(EMPTY_FINAL, None)
    wanted = tuple(_wanted(output, contract, regions, sinks) for output in message.outputs)
    inputs = Inputs(contract)
    raws = message.raw_input_contents
    if raws and len(raws) != len(message.inputs) and regions is None:
        raise _unlike_numbers(message, contract)
    at = 0
    for tensor in message.inputs:
        name = tensor.name
        shape = list(tensor.shape[:MOST_DIMS])  # a list of millions of numbers would take too much memory
        if not shape or min(shape) < 0 or len(shape) > MANY_DIMS:
            check_shape(name, shape)
        datatype = inputs.expect(name, tensor.datatype, shape)
        if tensor.parameters:
            given = _parameters(tensor.parameters, f"input {name!r}", in_memory=regions is not None)
            if regions is not None and (part := part_of(name, given)) is not None:
                raw = regions.read(part)
                check_size(name, datatype, shape, raw, contract.model)
                inputs.put(raw)
                continue
        if not raws:
            inputs.put(_contents(name, datatype, shape, tensor.contents))
            continue
        if tensor.HasField("contents"):
            raise _both_contents(name, contract)
        if at == len(raws):
            raise _wrong_number(message, at + 1, contract)
        raw = raws[at]
        at += 1
        check_size(name, datatype, shape, raw, contract.model)
        inputs.put(raw)
    if at != len(raws):
        raise _wrong_number(message, at, contract)
    tensors, data, rows = inputs.done()
    for_model, timeout_ms, priority, sequence = options(parameters, beside)
    key = contract.key(tensors, tuple(output.name for output in wanted), for_model)
    return Decoded(message.id, rows, key, data, wanted or None, True, timeout_ms, priority, sinks, sequence)


def _wanted(
    output: Any, contract: Contract, regions: Regions | None, sinks: dict[str, Sink] | None
) -> WantedOutput:
    name = output.name
    given = _parameters(output.parameters, f"output {name!r}", in_memory=regions is not None)
    if regions is not None and sinks is not None and given:
        given = sink_of(name, given, regions, sinks)
    return contract.want(name, True, given)


def _unlike_numbers(message: Any, contract: Contract) -> BadRequest:
    """Return the error for a request whose number of raw contents differs from its number of inputs.

    If an input is in shared memory, the number can be right, because such an input has no raw contents. Then
    raise UsesRegions.
    """
    for tensor in message.inputs:
        _parameters(tensor.parameters, f"input {tensor.name!r}")  # raises UsesRegions
    # As in Triton, an input with both kinds of contents is reported first. A wrong number of raw contents is
    # reported only if there is no such input.
    for tensor in message.inputs[: len(message.raw_input_contents)]:
        if tensor.HasField("contents"):
            return _both_contents(tensor.name, contract)
    return _wrong_number(message, len(message.inputs), contract)


def _both_contents(name: str, contract: Contract) -> BadRequest:
    return BadRequest(
        f"contents field must not be specified when using raw_input_contents for {name!r} for model "
        f"{contract.model!r}: send one of them"
    )


def _wrong_number(message: Any, expected: int, contract: Contract) -> BadRequest:
    count = len(message.raw_input_contents)
    told = f"got {count} raw_input_contents for {expected} inputs; send one for each input"
    if count < expected and count < len(message.inputs):
        name = message.inputs[count].name
        told = (
            f"unable to find data for input tensor {name!r} for model {contract.model!r} in request. {told}"
        )
    return BadRequest(told)


def wants_empty_final(message: Any) -> bool:
    """Return True if a request in a stream wants a last response without outputs."""
    return EMPTY_FINAL in message.parameters and bool(message.parameters[EMPTY_FINAL].bool_param)


def request_parameters(message: Any) -> dict[str, Any]:
    """Return the parameters of a request; raise BadRequest."""
    return _parameters(message.parameters, "request")


def _parameters(parameters: Any, where: str, *, in_memory: bool = False) -> dict[str, Any]:
    if not parameters:
        return {}
    values = {}
    for name, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise BadRequest(f"{where}: parameter {name!r} has no value")
        values[name] = getattr(value, kind)
    return check_parameters(values, where, in_memory=in_memory)


def _contents(name: str, datatype: Datatype, shape: list[int], contents: Any) -> bytes:
    """Return typed contents as a raw tensor.

    Raise BadRequest if the contents do not fit the datatype or the shape.
    """
    field = _CONTENTS.get(datatype.name)
    if field is None:
        raise BadRequest(f"input {name!r}: {datatype.name} has no typed contents; use raw_input_contents")
    values, expected = getattr(contents, field), elements(shape)
    if len(values) != expected:
        raise BadRequest(f"input {name!r}: shape {shape} needs {expected} elements, got {len(values)}")
    if datatype.name == "BYTES":
        check_count(name, expected)
        return pack_strings(list(values))
    if datatype.name in _RAW_ON_THE_WIRE:
        raw = _packed(contents.SerializeToString(), _RAW_ON_THE_WIRE[datatype.name], expected * datatype.size)
        if raw is not None:
            return raw
    try:
        return array(datatype.array_code, values).tobytes()
    except OverflowError:
        raise misfit(name, datatype, list(values)) from None


def _packed(wire: bytes, tag: int, size: int) -> bytes | None:
    """Return the bytes of a packed protobuf field as they are, without a conversion of its numbers.

    ``wire``: a serialized message. ``tag``: the tag of the field. ``size``: the expected bytes of the field.
    Return None if the message does not begin with this field, or if the field has another size.
    """
    at, length, shift = 1, 0, 0
    if wire[:1] != bytes((tag,)):
        return None
    while True:
        byte = wire[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            break
    return wire[at : at + size] if length == size else None


def encode(model: str, answer: InferenceResult, labels: Labels) -> Any:
    """Return an answer as ``ModelInferResponse``.

    Raise BadRequest if the request wants classes of an output whose datatype does not allow classes.
    """
    request, rows = answer.request, answer.rows
    outputs, data = classified(request, rows, answer.outputs, answer.reply.data, labels)
    message = ModelInferResponse(model_name=model, model_version=answer.route.version, id=request.id)
    for tensor, raw in zip(outputs, data, strict=True):
        shape = (rows, *tensor.dims) if rows else tensor.dims
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
        if request.sinks and (sink := request.sinks.get(tensor.name)) is not None:
            sink.write(tensor.name, raw)
            set_parameters(output.parameters, sink.part.parameters(len(raw)))
            raw = b""  # the list keeps an empty entry for this output, as in Triton
        message.raw_output_contents.append(bytes(raw))
    if answer.parameters:
        set_parameters(message.parameters, answer.parameters)
    return message


def set_parameters(field: Any, values: Mapping[str, Any]) -> None:
    """Write parameters to the parameter map of a message."""
    for name, value in values.items():
        if isinstance(value, bool):
            field[name].bool_param = value
        elif isinstance(value, int):
            field[name].int64_param = value
        elif isinstance(value, float):
            field[name].double_param = value
        else:
            field[name].string_param = str(value)
