"""Build the signature of an MLflow model from its schema: named columns, or tensors. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.mlflow_model import MlflowModel
from tidegate.kernel.protocol.models import Datatype, Signature, TensorSpec

_COLUMNS: dict[str, Datatype] = {
    "boolean": "BOOL", "integer": "INT32", "long": "INT64", "float": "FP32", "double": "FP64",
    "string": "BYTES", "binary": "BYTES", "datetime": "BYTES",
}  # fmt: skip
# Values of these types are JSON texts.
_NESTED = frozenset({"array", "object", "map", "any", "sparkml_vector"})
_TENSORS: dict[str, Datatype] = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64", "object": "BYTES", "str": "BYTES",
}  # fmt: skip
_HOW = (
    "Log it with a signature (mlflow.models.infer_signature), or pass one: "
    "`tidegate deploy --signature FILE.json`."
)


@dataclass(frozen=True, slots=True)
class Schema:
    """The inputs or the outputs of a model, as MLflow describes them.

    ``columns``: the type of each column of a table, by name and in the table's order; None: not a table.
    ``named``: True if the schema names its tensors or columns. Otherwise Tidegate chose the names.
    ``batched``: True if the first axis can have any size in every tensor. In a table, this axis is the rows.
    """

    tensors: tuple[TensorSpec, ...]
    columns: dict[str, str] | None
    named: bool
    batched: bool


def inputs_of(model: MlflowModel) -> Schema | None:
    """Return the model's inputs; None if none are described. Raise BadRequest for a wrong description."""
    return _schema(model, "inputs", "input")


def columns_of(model: MlflowModel, signature: Signature) -> dict[str, str] | None:
    """Return the type of each column if the model gets a table; None if it gets tensors.

    If the model does not describe its inputs, two or more inputs of ``signature`` are read as columns, and a
    single input is read as a tensor.
    """
    schema = inputs_of(model)
    if schema is not None:
        return schema.columns
    if len(signature.inputs) == 1:
        return None
    return {each.name: "string" if each.datatype == "BYTES" else "any number" for each in signature.inputs}


def signature_of(model: MlflowModel, given: Signature | None, default_max_batch: int) -> Signature:
    """Return ``given`` if it is set, and otherwise the signature in ``MLmodel``.

    Raise BadRequest with a remedy if ``given`` has other inputs than ``MLmodel``, or if neither describes the
    model.

    If the first axis of every tensor in ``MLmodel`` may have any size, it is the batch axis. In a table, the
    rows are the batch axis.
    """
    inputs = inputs_of(model)
    if given is not None:
        if inputs is not None and inputs.named and _names(inputs.tensors) != _names(given.inputs):
            raise BadRequest(
                f"The signature's inputs are {_quoted(_names(given.inputs))}, but those of the MLflow model "
                f"are {_quoted(_names(inputs.tensors))}. Use the model's names."
            )
        return given
    outputs = _schema(model, "outputs", "output")
    if inputs is None or outputs is None:
        side = "inputs" if inputs is None else "outputs"
        raise BadRequest(f"The MLflow model does not say its {side}. {_HOW}")
    rows = inputs.batched and outputs.batched
    try:
        return Signature(
            inputs=[_spec(spec, inputs, rows=rows) for spec in inputs.tensors],
            outputs=[_spec(spec, outputs, rows=rows) for spec in outputs.tensors],
            max_batch_size=default_max_batch if rows else 0,
        )
    except ValidationError as error:
        raise BadRequest(
            f"The MLflow model's signature cannot be served: {error.errors()[0]['msg']}."
        ) from None


def _spec(spec: TensorSpec, schema: Schema, *, rows: bool) -> TensorSpec:
    if schema.columns is not None:
        return spec if rows else spec.model_copy(update={"shape": [-1]})
    return spec.model_copy(update={"shape": spec.shape[1:]}) if rows else spec


def _schema(model: MlflowModel, side: str, default: str) -> Schema | None:
    text = (model.signature or {}).get(side)
    if not text:
        return None
    try:
        entries = json.loads(text) if isinstance(text, str) else text
        if not isinstance(entries, list) or not entries:
            raise ValueError("it is not a list with entries")
        if any(entry.get("type") == "tensor" for entry in entries):
            return _tensors(entries, default)
        return _table(entries, default)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise BadRequest(
            f"The {side} of the MLflow model's signature cannot be read ({str(problem)[:120]}). {_HOW}"
        ) from None


def _tensors(entries: Sequence[Any], default: str) -> Schema:
    named = all("name" in entry for entry in entries)
    if not named and len(entries) > 1:
        raise ValueError("several tensors have no names")
    specs = []
    for entry in entries:
        inner = entry["tensor-spec"]
        kind = _TENSORS.get(str(inner["dtype"]))
        if kind is None:
            raise ValueError(f"the datatype {str(inner['dtype'])[:40]!r} cannot be sent")
        shape = [int(size) for size in inner["shape"]]
        specs.append(TensorSpec(name=str(entry.get("name") or default), datatype=kind, shape=shape))
    batched = all(spec.shape[:1] == [-1] for spec in specs)
    return Schema(tuple(specs), None, named, batched)


def _table(entries: Sequence[Any], default: str) -> Schema:
    named = all(entry.get("name") is not None for entry in entries)
    if not named and len(entries) > 1:
        # Columns without names are served as one array, which has a row for each sample.
        kinds = {str(entry["type"]) for entry in entries}
        if len(kinds) != 1 or (kind := _COLUMNS.get(kinds.pop())) is None:
            raise ValueError("some columns have no names, and their types differ or are not supported")
        return Schema((TensorSpec(name=default, datatype=kind, shape=[-1, len(entries)]),), None, False, True)
    columns: dict[str, str] = {}
    specs = []
    for entry in entries:
        name, given = str(entry.get("name") or default), str(entry["type"])
        if given not in _COLUMNS and given not in _NESTED:
            raise ValueError(f"the type {given[:40]!r} is unknown")
        optional = entry.get("required") is False or entry.get("optional") is True
        columns[name] = given
        specs.append(TensorSpec(name=name, datatype=_COLUMNS.get(given, "BYTES"), optional=optional))
    return Schema(tuple(specs), columns, named, True)


def _names(tensors: Sequence[TensorSpec]) -> list[str]:
    return [tensor.name for tensor in tensors]


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:12]))
