"""Derive a signature from an ONNX graph, or check a user's signature against the graph. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from services.registry.domain import names
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Datatype, Signature, TensorSpec


@dataclass(frozen=True, slots=True)
class GraphValue:
    """An input or output as an ONNX file declares it.

    ``dims``: the size of each axis; None for a dynamic axis. ``dims`` None: the rank is not declared.
    ``datatype`` None: the value is not a tensor, or the inference protocol lacks its element type.
    """

    name: str
    kind: str
    datatype: Datatype | None
    dims: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """The inputs and outputs of a graph, without its weights.

    ``what``: the graph's name in messages.
    """

    inputs: tuple[GraphValue, ...]
    outputs: tuple[GraphValue, ...]
    what: str = "the ONNX graph"

    @property
    def values(self) -> tuple[GraphValue, ...]:
        """Return the inputs, then the outputs."""
        return self.inputs + self.outputs


def of_graph(graph: OnnxGraph, user_signature: Signature | None, default_max_batch: int) -> Signature:
    """Return the user's signature, or derive one from the graph if ``user_signature`` is None.

    If the first axis of every input and output is dynamic, it is the batch axis. Then max_batch_size of a
    derived signature is ``default_max_batch``, and its shapes leave that axis out. Raise BadRequest if the
    user's signature does not agree with the graph, or if the graph cannot be served.
    """
    _check_servable(graph)
    if user_signature is not None:
        check(user_signature)
        _check_agrees(user_signature, graph)
        return user_signature
    shapeless = [value.name for value in graph.values if value.dims is None]
    if shapeless:
        raise BadRequest(
            f"{_sentence(graph.what)} does not declare the rank of {names.quoted(shapeless)}. Add a "
            "signature (`tidegate deploy --signature FILE.json`), or add the shapes with "
            "onnx.shape_inference and save the file again."
        )
    batched = all(value.dims and value.dims[0] is None for value in graph.values)
    result = Signature(
        inputs=[_tensor(value, batched) for value in graph.inputs],
        outputs=[_tensor(value, batched) for value in graph.outputs],
        max_batch_size=default_max_batch if batched else 0,
    )
    check(result)
    return result


def check(signature: Signature) -> None:
    """Raise BadRequest if a name appears twice. pydantic has already checked the fields."""
    for role, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        twice = [name for name, times in Counter(t.name for t in tensors).items() if times > 1]
        if twice:
            raise BadRequest(
                f"The signature's {role} have {names.quoted(twice)} more than once: names must be unique."
            )


def _check_servable(graph: OnnxGraph) -> None:
    if not graph.inputs or not graph.outputs:
        missing = "input" if not graph.inputs else "output"
        raise BadRequest(
            f"{_sentence(graph.what)} declares no {missing}, so it cannot serve requests. Export the model "
            "with at least one."
        )
    for value in graph.values:
        if value.kind != "tensor":
            raise BadRequest(
                f"{value.name!r} of {graph.what} is a {value.kind}, but only tensors can be served. "
                "Convert a scikit-learn classifier with options={'zipmap': False} "
                "(skl2onnx: convert_sklearn(model, ..., options={'zipmap': False}))."
            )
        if value.datatype is None:
            raise BadRequest(
                f"{value.name!r} of {graph.what} has an element type that the inference protocol does not "
                "have. In the graph, cast the tensor to one of FP16, BF16, FP32, FP64, BOOL, INT8-64, "
                "UINT8-64 or string."
            )


def _check_agrees(user_signature: Signature, graph: OnnxGraph) -> None:
    for role, tensors, values in (
        ("inputs", user_signature.inputs, graph.inputs),
        ("outputs", user_signature.outputs, graph.outputs),
    ):
        declared = {value.name: value for value in values}
        if {tensor.name for tensor in tensors} != set(declared):
            raise BadRequest(
                f"The signature's {role} are {names.quoted([t.name for t in tensors])}, but those of "
                f"{graph.what} are {names.quoted(sorted(declared))}. Use the names of the model."
            )
        for tensor in tensors:
            batched = user_signature.max_batch_size > 0
            _check_tensor_agrees(tensor, declared[tensor.name], graph.what, batched=batched)


def _check_tensor_agrees(tensor: TensorSpec, value: GraphValue, what: str, *, batched: bool) -> None:
    if tensor.datatype != value.datatype:
        raise BadRequest(
            f"The signature says that {tensor.name!r} is {tensor.datatype}, but {what} says {value.datatype}."
        )
    if value.dims is None:
        return
    dims = [-1, *tensor.shape] if batched else tensor.shape
    fits = len(dims) == len(value.dims) and all(
        in_graph is None or in_user in (-1, in_graph)
        for in_user, in_graph in zip(dims, value.dims, strict=True)
    )
    if not fits:
        declared = [-1 if dim is None else dim for dim in value.dims]
        raise BadRequest(
            f"The signature says that {tensor.name!r} has the shape {dims}"
            f"{' (with the batch axis)' if batched else ''}, but {what} says {declared}."
        )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _tensor(value: GraphValue, batched: bool) -> TensorSpec:
    assert value.dims is not None
    assert value.datatype is not None
    dims: Sequence[int | None] = value.dims[1:] if batched else value.dims
    shape = [-1 if dim is None else dim for dim in dims]
    return TensorSpec(name=value.name, datatype=value.datatype, shape=shape)
