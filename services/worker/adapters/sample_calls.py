"""Make calls of a model from sample requests, and read their answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.worker.adapters.triton_client import ModelInferRequest
from services.worker.domain.split import Output
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.tensors import DATATYPES, from_json, to_json

# The fields of Triton's InferParameter, by the type of the JSON value.
_PARAMETERS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


def request_of(model: str, sample: Mapping[str, Any]) -> Any:
    """Return a JSON request of the Open Inference Protocol (OIP) as a ``ModelInferRequest``.

    Raises BadRequest if the request is malformed.
    """
    request = ModelInferRequest(model_name=model)
    for tensor in sample["inputs"]:
        try:
            name, kind, shape = str(tensor["name"]), DATATYPES[tensor["datatype"]], list(tensor["shape"])
            raw = from_json(name, kind, shape, tensor["data"])
            request.inputs.add(name=name, datatype=kind.name, shape=shape)
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(
                f"an input of the sample cannot be read ({error!r}): an input needs name, datatype, shape "
                "and data"
            ) from None
        request.raw_input_contents.append(raw)
    for name, value in (sample.get("parameters") or {}).items():
        if (field := _PARAMETERS.get(type(value))) is not None:
            setattr(request.parameters[name], field, value)
    return request


def rows_of(request: Any, signature: Signature) -> int:
    """Return the number of rows of a request; 1 if the model has no batch axis."""
    if signature.max_batch_size < 1 or not request.inputs or not request.inputs[0].shape:
        return 1
    return int(request.inputs[0].shape[0])


def repeated(request: Any, times: int) -> Any:
    """Return a request with the rows of ``request``, repeated ``times`` times."""
    made = ModelInferRequest()
    made.CopyFrom(request)
    for at, tensor in enumerate(made.inputs):
        tensor.shape[0] *= times
        made.raw_input_contents[at] = made.raw_input_contents[at] * times
    return made


def outputs_of(answer: Any) -> list[Output]:
    """Return the outputs of a ``ModelInferResponse``."""
    contents = list(answer.raw_output_contents)
    return [
        Output(each.name, each.datatype, tuple(each.shape), contents[at] if at < len(contents) else b"")
        for at, each in enumerate(answer.outputs)
    ]


def as_json(outputs: list[Output]) -> dict[str, Any]:
    """Return outputs as a JSON answer of the Open Inference Protocol (OIP).

    If an output has strings that are not UTF-8, its list ``data`` is empty.
    """
    found = []
    for each in outputs:
        values = to_json(DATATYPES[each.datatype], each.raw)
        data = values if values is None or isinstance(values, list) else values.tolist()
        found.append({"name": each.name, "data": data or []})
    return {"outputs": found}
