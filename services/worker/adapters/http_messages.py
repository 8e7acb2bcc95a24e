"""Build HTTP requests for inference from raw tensor bytes, and read the responses.

The format is Triton's extension for binary tensor data: a body is JSON, followed by the bytes of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from services.worker.adapters.http_calls import HttpAnswer
from services.worker.adapters.model_call import ModelAnswer, ModelCall, set_by_model
from services.worker.adapters.shared_memory import Place
from services.worker.domain.split import Output
from tidegate.kernel.protocol.envelope import KEPT_KEY

HEADS_KEPT = 1024
_INT64 = range(-(2**63), 2**63)
# Triton's HTTP server reads this parameter itself and does not pass it to the model. Over gRPC, the model
# gets it. So a request that has this parameter must use gRPC.
_BINARY_OUTPUT = "binary_data_output"


class _Described(NamedTuple):
    """The parsed JSON of a response.

    ``outputs``: the name, the datatype, the shape and the size in bytes of each output.
    """

    outputs: list[tuple[str, str, tuple[int, ...], int]]
    parameters: dict[str, Any]


def can_carry(parameters: Mapping[str, object]) -> bool:
    """Return True if the model gets these parameters over HTTP exactly as over gRPC."""
    return _BINARY_OUTPUT not in parameters and all(map(_is_exact, parameters.values()))


def _is_exact(value: object) -> bool:
    return isinstance(value, str | bool) or (isinstance(value, int) and value in _INT64)


def head(model: str, call: ModelCall, sizes: Sequence[int]) -> bytes:
    """Return the part of an inference request over HTTP that comes before the bytes of its tensors.

    ``sizes``: the number of bytes of each input that is not in shared memory.
    """
    key, body = call.key, dict[str, Any]()
    direct = iter(sizes)
    body["inputs"] = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype.name,
            "shape": [call.rows, *tensor.dims] if call.rows else list(tensor.dims),
            "parameters": (
                _reference(call.input_places[tensor.name])
                if tensor.name in call.input_places
                else {"binary_data_size": next(direct)}
            ),
        }
        for tensor in key.inputs
    ]
    body["parameters"] = {**key.parameters, **call.parameters, _BINARY_OUTPUT: True}
    if key.outputs:
        places = call.output_places
        body["outputs"] = [
            {
                "name": name,
                "parameters": _reference(places[name]) if name in places else {"binary_data": True},
            }
            for name in key.outputs
        ]
    json = orjson.dumps(body)
    return (
        b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: triton\r\nInference-Header-Content-Length: %d\r\n"
        b"Content-Length: %d\r\n\r\n%s"
    ) % (model.encode(), len(json), len(json) + sum(sizes), json)


def read_answer(answer: HttpAnswer) -> ModelAnswer:
    """Return a response's outputs and the parameters that the model set.

    An output in shared memory is returned without bytes.
    """
    # A long head is not cached, because the same head is unlikely to come again.
    described = _described(answer.head) if len(answer.head) <= KEPT_KEY else _describe(answer.head)
    found, at = [], 0
    for name, datatype, shape, size in described.outputs:
        found.append(Output(name, datatype, shape, answer.data[at : at + size]))
        at += size
    return ModelAnswer(found, described.parameters)


def _reference(place: Place) -> dict[str, object]:
    return {
        "shared_memory_region": place.region,
        "shared_memory_offset": place.offset,
        "shared_memory_byte_size": place.size,
    }


def _describe(head: bytes) -> _Described:
    response = orjson.loads(head)
    outputs = [
        (output["name"], output["datatype"], tuple(output["shape"]), _size(output))
        for output in response["outputs"]
    ]
    parameters = response.get("parameters") or {}
    return _Described(outputs, {name: value for name, value in parameters.items() if set_by_model(name)})


def _size(output: Mapping[str, Any]) -> int:
    """Return how many bytes of an output follow the JSON; 0 if it is in shared memory."""
    if "parameters" not in output and "data" not in output:
        return 0
    size: int = output["parameters"]["binary_data_size"]
    return size


# The result is cached, because calls of the same kind have equal heads.
_described = lru_cache(HEADS_KEPT)(_describe)
