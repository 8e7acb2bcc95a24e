"""Build gRPC requests for inference from raw tensor bytes, and read the responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.worker.adapters.model_call import ModelAnswer, ModelCall, set_by_model
from services.worker.adapters.shared_memory import Place
from services.worker.domain.split import Output
from tidegate.kernel.protocol.envelope import Buffer, CallKey
from tidegate.kernel.triton_protocol import ModelInferRequest

# The protobuf tag of ``raw_input_contents`` (field 7, bytes) in a ModelInferRequest. Fields may come in any
# order, so the tensors can be appended to the cached first part of a request.
RAW_INPUT = bytes((7 << 3 | 2,))
_SIGN = 2**63


def begin(model: str, parameters: Mapping[str, object]) -> Any:
    """Return a ``ModelInferRequest`` with the model's name and these parameters, without tensors."""
    return _with_parameters(ModelInferRequest(model_name=model), parameters)


def head(model: str, call: ModelCall) -> bytes:
    """Return a serialized ``ModelInferRequest`` that describes its tensors but lacks their bytes."""
    message = begin(model, call.key.parameters)
    describe(message, call.key, call.rows)
    for tensors, places in ((message.inputs, call.input_places), (message.outputs, call.output_places)):
        if places:
            for tensor in tensors:
                if tensor.name in places:
                    _refer(tensor, places[tensor.name])
    head: bytes = message.SerializeToString()
    return head


def describe(message: Any, key: CallKey, rows: int) -> None:
    """Add to a request: the name, datatype and shape of each input, and the names of the outputs.

    ``rows``: the number of rows; 0 if the model has no batch axis.
    """
    for tensor in key.inputs:
        shape = (rows, *tensor.dims) if rows else tensor.dims
        message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=shape)
    for name in key.outputs:
        message.outputs.add(name=name)


def serialized(parameters: Mapping[str, object]) -> bytes:
    """Return serialized parameters, which can be appended to the head of a request."""
    serialized: bytes = _with_parameters(ModelInferRequest(), parameters).SerializeToString()
    return serialized


def with_contents(head: bytes, contents: Sequence[Sequence[Buffer]]) -> list[Buffer]:
    """Return the pieces of a serialized request: its head, then the bytes of each input."""
    pieces: list[Buffer] = [head]
    for tensor in contents:
        pieces.append(RAW_INPUT + _varint(sum(map(len, tensor))))
        pieces += tensor
    return pieces


def read_answer(response: Any) -> ModelAnswer:
    """Return the outputs of a ``ModelInferResponse``, and the parameters that the model set."""
    outputs = [
        Output(output.name, output.datatype, tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]
    if not response.parameters:
        return ModelAnswer(outputs, {})
    found = {}
    for name, parameter in response.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None and set_by_model(name):
            found[name] = getattr(parameter, kind)
    return ModelAnswer(outputs, found)


def _refer(tensor: Any, place: Place) -> None:
    """Make an input or a requested output refer to shared memory."""
    tensor.parameters["shared_memory_region"].string_param = place.region
    tensor.parameters["shared_memory_offset"].int64_param = place.offset
    tensor.parameters["shared_memory_byte_size"].int64_param = place.size


def _with_parameters(message: Any, parameters: Mapping[str, object]) -> Any:
    for name, value in parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            # A sequence id is unsigned, but Triton reads it from this signed field. So an id of 2**63 or more
            # is sent as the negative number with the same bits.
            parameter.int64_param = value if value < _SIGN else value - 2 * _SIGN
        elif isinstance(value, float):
            parameter.double_param = value
        else:
            parameter.string_param = str(value)
    return message


def _varint(number: int) -> bytes:
    """Encode a length as protobuf does: seven bits in each byte, the lowest bits first."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
