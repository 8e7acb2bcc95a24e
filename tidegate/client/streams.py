"""The request and the events of ``/generate_stream``. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import orjson

from tidegate.client.codec import Array, Tensor, from_json_output
from tidegate.client.errors import BadAnswer, from_document
from tidegate.client.flow import Answer
from tidegate.client.result import InferResult

_DATA = "data:"
_KNOWN = frozenset({"id", "model_name", "model_version"})


@dataclass(frozen=True, slots=True)
class Opened:
    """An open stream: its response, and the model's metadata."""

    answer: Answer
    metadata: Mapping[str, Any]


def encode(tensors: Sequence[Tensor], request_id: str | None, parameters: Mapping[str, Any] | None) -> bytes:
    """Return the body of a request: the inputs by name, as nested lists."""
    body: dict[str, Any] = {tensor.name: _plain(tensor) for tensor in tensors}
    if request_id is not None:
        body["id"] = request_id
    if parameters:
        body["parameters"] = dict(parameters)
    return orjson.dumps(body)


def _plain(tensor: Tensor) -> Any:
    values = tensor.array.tolist()
    return _text(values) if tensor.datatype == "BYTES" else values


def _text(values: Any) -> Any:
    if isinstance(values, list):
        return [_text(value) for value in values]
    return values.decode("utf-8") if isinstance(values, bytes) else values


def read_line(line: str, opened: Opened) -> InferResult | None:
    """Return the answer in a line of the stream, or None if the line has no answer.

    If the line contains the error that ended the stream, raise this error. Raise BadAnswer for a malformed
    line.
    """
    if not line.startswith(_DATA):
        return None  # an empty line between events, or a comment
    try:
        event = orjson.loads(line[len(_DATA) :])
    except orjson.JSONDecodeError:
        event = None
    if not isinstance(event, dict):
        raise BadAnswer("An event of the stream is not a JSON object.")
    specs = {spec["name"]: spec for spec in opened.metadata.get("outputs") or ()}
    if "error" in event and "reason" in event and "error" not in specs:
        raise from_document(event)
    names = [name for name in event if name in specs or not (specs or name in _KNOWN)]
    try:
        outputs = {name: _array(event[name], specs.get(name)) for name in names}
    except (ValueError, TypeError, KeyError) as error:
        raise BadAnswer(f"An event of the stream has a malformed output: {error}.") from None
    return InferResult(
        outputs,
        model_name=str(event.get("model_name", "")),
        model_version=str(event.get("model_version", "")),
        request_id=opened.answer.headers.get("x-request-id") or str(event.get("id", "")),
        timing={},
        parameters={name: event[name] for name in event if name not in outputs and name not in _KNOWN},
        feedback_id=opened.answer.headers.get("x-feedback-id") or "",
    )


def _array(value: Any, spec: Mapping[str, Any] | None) -> Array:
    values = value if isinstance(value, list) else [value]
    if spec is None:  # the signature is not known yet
        return np.array([v.encode() for v in values] if values and isinstance(values[0], str) else values)
    shape = shape_of(spec["shape"], len(values))
    return from_json_output({"datatype": spec["datatype"], "shape": shape, "data": values})


def shape_of(declared: Sequence[int], count: int) -> list[int]:
    """Return the shape of one row with ``count`` values.

    ``declared``: the output's shape in the model's metadata; -1 means any size. If ``declared`` does not
    determine the row's shape, return ``[count]``.
    """
    dims = list(declared)
    if dims.count(-1) > 1:
        dims[dims.index(-1)] = 1  # a stream's answer is one row, so the batch axis has size 1
    known = prod(dim for dim in dims if dim != -1)
    if dims.count(-1) == 1 and known and count % known == 0:
        return [count // known if dim == -1 else dim for dim in dims]
    return dims if -1 not in dims and known == count else [count]
