"""Read the inputs and outputs of an ONNX file from its protobuf, without loading the model.

The package ``onnx`` would load the whole file into memory. If a file has two graphs, the package would also
merge them without an error, but such a file must be rejected (ADR 014). The field numbers are from
onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from services.registry.domain.signature import GraphValue, OnnxGraph
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import onnx_external
from tidegate.kernel.protocol.models import Datatype
from tidegate.kernel.protocol.onnx_external import External
from tidegate.kernel.protocol.protobuf_wire import Budget, Malformed, Message

MODEL_IR_VERSION, MODEL_GRAPH = 1, 7
GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 5, 11, 12, 15
TENSOR_NAME = 8
SPARSE_TENSORS = (1, 2)
VALUE_NAME, VALUE_TYPE = 1, 2
TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1
KINDS = {1: "tensor", 4: "sequence", 5: "map", 7: "opaque value", 8: "sparse tensor", 9: "optional value"}

DATATYPES: dict[int, Datatype] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip


def read(path: Path, sizes: Mapping[str, int] | None = None) -> OnnxGraph:
    """Return the inputs and outputs of an ONNX file. Inputs that only name weights are left out.

    ``sizes``: the sizes in bytes of the archive's other files, by path; None if the file is not in an
    archive.

    Blocking: call it in a thread. Raise BadRequest if the file is not an ONNX model, or if a file with
    weights is missing.
    """
    if not path.stat().st_size:
        raise BadRequest("The ONNX file is empty. Export the model again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            model = Message(data, 0, len(data), Budget())
            for external in onnx_external.externals(model):
                _check_external(external, sizes)
            return _graph(_main_graph(model))
        except Malformed as error:
            raise BadRequest(f"The file is not an ONNX model ({error}). Export the model again.") from None


def _check_external(external: External, sizes: Mapping[str, int] | None) -> None:
    if sizes is None:
        raise BadRequest(
            f"The ONNX file keeps weights ({external.tensor!r}) in another file, {external.location[:80]!r} "
            "(external data), which was not uploaded. `tidegate deploy` uploads it too. Over REST, send "
            "both as a tar or zip with format=onnx, or save the model as one file "
            "(onnx.save(model, path, save_as_external_data=False))."
        )
    size = sizes.get(str(PurePosixPath(external.location)))
    if size is None:
        raise BadRequest(
            f"The ONNX file keeps weights ({external.tensor!r}) in {external.location[:80]!r}, but the "
            f"archive has no such file. Its other files: {', '.join(sorted(sizes))[:200] or 'none'}."
        )
    if external.end > size:
        raise BadRequest(
            f"The ONNX file keeps weights ({external.tensor!r}) up to byte {external.end} of "
            f"{external.location[:80]!r}, which has only {size} bytes. It is a different file, or incomplete."
        )


def _main_graph(model: Message) -> Message:
    graph, versioned = None, False
    for number, value in model.fields():
        if number == MODEL_GRAPH and isinstance(value, Message):
            if graph is not None:  # a protobuf library would merge the two graphs without an error
                raise Malformed("it has two graphs")
            graph = value
        versioned = versioned or (number == MODEL_IR_VERSION and isinstance(value, int))
    if graph is None or not versioned:
        raise Malformed("it has no graph" if versioned else "it has no IR version")
    return graph


def _graph(graph: Message) -> OnnxGraph:
    weights: set[str] = set()
    inputs: list[GraphValue] = []
    outputs: list[GraphValue] = []
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == GRAPH_INITIALIZER:
            weights.add(_name(value))
        elif number == GRAPH_SPARSE:
            parts = (part for kind, part in value.fields() if kind in SPARSE_TENSORS)
            weights.update(_name(part) for part in parts if isinstance(part, Message))
        elif number == GRAPH_INPUT:
            inputs.append(_value(value))
        elif number == GRAPH_OUTPUT:
            outputs.append(_value(value))
    true_inputs = tuple(each for each in inputs if each.name not in weights)
    return OnnxGraph(true_inputs, tuple(outputs))


def _name(tensor: Message) -> str:
    name = ""
    for text in tensor.messages(TENSOR_NAME):
        name = text.text()
    return name


def _value(info: Message) -> GraphValue:
    name, kind, datatype, dims = "", "value without a type", None, None
    for number, value in info.fields():
        if number == VALUE_NAME and isinstance(value, Message):
            name = value.text()
        elif number == VALUE_TYPE and isinstance(value, Message):
            for choice, inner in value.fields():
                kind = KINDS.get(choice, kind)
                if choice == 1 and isinstance(inner, Message):
                    datatype, dims = _tensor_type(inner)
    return GraphValue(name, kind, datatype, dims)


def _tensor_type(tensor: Message) -> tuple[Datatype | None, tuple[int | None, ...] | None]:
    datatype, dims = None, None
    for number, value in tensor.fields():
        if number == TENSOR_ELEMENT and isinstance(value, int):
            datatype = DATATYPES.get(value)
        elif number == TENSOR_SHAPE and isinstance(value, Message):
            dims = tuple(_dim(dim) for dim in value.messages(SHAPE_DIM))
    return datatype, dims


def _dim(dim: Message) -> int | None:
    for number, value in dim.fields():
        # Some exporters write -1 or 0 for a dynamic axis. As a varint, -1 is read as a number above 2**63.
        if number == DIM_VALUE and isinstance(value, int) and 0 < value < 1 << 63:
            return value
    return None
