"""Build the signature of a Python file with ``predict``, and the plan for calling ``predict``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature, TensorSpec
from tidegate.kernel.protocol.python_model import Source, Value

_LISTED = 8


def signature_of(source: Source, given: Signature | None) -> Signature:
    """Return ``given`` if it is set, and otherwise the signature from the annotations.

    Raises BadRequest if ``given`` does not fit the function, or if ``given`` is None and annotations are
    missing.
    """
    if given is not None:
        return _fitting(source, given)
    missing = [value.why for value in source.inputs if value.found is None]
    if source.takes_any and not source.inputs:
        missing.append("an argument with `**` does not name the inputs")
    if source.why:
        missing.append(source.why)
    if missing:
        raise BadRequest(_unclear(source, missing))
    if not source.inputs:
        raise BadRequest(
            "predict takes no arguments, so the model has no inputs: give predict at least one argument."
        )
    return Signature(
        inputs=[_spec(value, source.max_size) for value in source.inputs],
        outputs=[_spec(value, source.max_size) for value in source.outputs],
        max_batch_size=source.max_size,
        decoupled=source.streams,
    )


def calling_plan(source: Source, signature: Signature) -> dict[str, Any]:
    """Return how to call ``predict``, as a JSON document for the process that runs the model's Python."""
    found = {value.name: value.found for value in source.inputs}
    axes = 1 if signature.max_batch_size else 0
    inputs = {}
    for spec in signature.inputs:
        by_annotation = found.get(spec.name)
        kind = by_annotation.kind if by_annotation else "array"
        inputs[spec.name] = {"kind": kind, "text": by_annotation is not None and by_annotation.text}
    return {
        "entry": source.entry,
        "load": source.load,
        "inputs": inputs,
        "outputs": [
            {"name": spec.name, "datatype": spec.datatype, "dims": [-1] * axes + spec.shape}
            for spec in signature.outputs
        ],
        "rows": signature.max_batch_size,
        "streams": source.streams,
        "asynchronous": source.asynchronous,
    }


def _fitting(source: Source, given: Signature) -> Signature:
    """Return the given signature. Raises BadRequest if ``predict`` cannot be called with it."""
    known = [value.name for value in source.inputs]
    named = [spec.name for spec in given.inputs]
    if unknown := [] if source.takes_any else [name for name in named if name not in known]:
        raise BadRequest(
            f"The signature has the inputs {_quoted(named)}. The arguments of predict are "
            f"{_quoted(known)}: {_quoted(unknown)} is not among them. Each input needs an argument of "
            "the same name."
        )
    if absent := [v.name for v in source.inputs if not v.optional and v.name not in named]:
        raise BadRequest(
            f"predict takes {_quoted(absent)}, and the signature has no such input: add it, or give the "
            "argument a default."
        )
    if given.max_batch_size and not source.max_size:
        raise BadRequest(
            f'The signature says "max_batch_size": {given.max_batch_size}, so predict would get the rows of '
            f"several requests: write @batched(max_size={given.max_batch_size}) above it (from tidegate "
            'import batched), or set "max_batch_size": 0 and state the whole shapes.'
        )
    if source.max_size and given.max_batch_size != source.max_size:
        raise BadRequest(
            f"predict is @batched(max_size={source.max_size}), and the signature says "
            f'"max_batch_size": {given.max_batch_size}: use the same number in both.'
        )
    return given.model_copy(update={"decoupled": source.streams})


def _spec(value: Value, max_size: int) -> TensorSpec:
    found = value.found
    assert found is not None
    shape = found.shape
    if max_size:
        if found.kind == "scalar":
            raise BadRequest(
                f"predict is @batched, but `{value.name}` is one value, not one value for each row. "
                "Annotate "
                'it as a list, such as list[str], or as an array, such as Tensor["FP32", -1].'
            )
        if shape[0] != -1:
            raise BadRequest(
                f"predict is @batched, so the first axis of `{value.name}` holds the rows of several "
                f"requests and has any size: write Tensor[{found.datatype!r}, "
                f"{', '.join(map(str, (-1, *shape)))}]."
            )
        shape = shape[1:]
    try:
        return TensorSpec(
            name=value.name, datatype=found.datatype, shape=list(shape), optional=value.optional
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRequest(
            f"{value.name[:80]!r} of predict cannot be served: {where}: {first['msg']}."
        ) from None


def _unclear(source: Source, missing: Sequence[str]) -> str:
    args = ", ".join(f'{value.name}: Tensor["FP32", -1, 4]' for value in source.inputs[:2]) or "x: ..."
    shown = "; ".join(missing[:_LISTED])
    return (
        f"The signature of predict is not clear: {shown}. Either annotate predict in the file, as in "
        f'`def predict({args}) -> Tensor["FP32", -1]` (from tidegate import Tensor), or pass the signature '
        "with --signature FILE.json (docs/models.md shows both)."
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
