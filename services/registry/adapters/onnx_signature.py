"""Inputs and outputs of an ONNX file, read from its protobuf without running or loading the model.

Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from services.registry.adapters.protobuf_wire import Budget, Malformed, Message
from services.registry.domain.signature import Graph, GraphValue
from tidegate.errors import BadRequest
from tidegate.protocol.models import Datatype

MODEL_IR_VERSION, MODEL_GRAPH = 1, 7
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 5, 11, 12, 15
NODE_ATTRIBUTE, ATTRIBUTE_TENSOR, ATTRIBUTE_GRAPH = 5, 5, 6
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 10, 11
TENSOR_NAME, TENSOR_LOCATION, LOCATION_EXTERNAL, SPARSE_VALUES = 8, 14, 1, 1
VALUE_NAME, VALUE_TYPE = 1, 2
TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIM, DIM_VALUE = 1, 2, 1, 1
KINDS = {1: "tensor", 4: "sequence", 5: "map", 7: "opaque value", 8: "sparse tensor", 9: "optional value"}
MAX_NESTED_GRAPHS = 32

DATATYPES: dict[int, Datatype] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES",
    9: "BOOL", 10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip


def read(path: Path) -> Graph:
    """The graph's inputs (its weights left out) and outputs.

    Blocking: call it in a thread. Raises BadRequest when the file is no ONNX model, or keeps weights
    in other files.
    """
    if not path.stat().st_size:
        raise BadRequest("The ONNX file is empty.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _graph(_main_graph(Message(data, 0, len(data), Budget())))
        except Malformed as error:
            raise BadRequest(f"The file is not an ONNX model ({error}).") from None


def _main_graph(model: Message) -> Message:
    graph, versioned = None, False
    for number, value in model.fields():
        if number == MODEL_GRAPH and isinstance(value, Message):
            graph = value
        versioned = versioned or (number == MODEL_IR_VERSION and isinstance(value, int))
    if graph is None or not versioned:
        raise Malformed("it has no graph" if versioned else "it has no IR version")
    return graph


def _graph(graph: Message) -> Graph:
    weights: set[str] = set()
    inputs: list[GraphValue] = []
    outputs: list[GraphValue] = []
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == GRAPH_NODE:
            _check_node(value, 0)
        elif number == GRAPH_INITIALIZER:
            weights.add(_stored_tensor(value))
        elif number == GRAPH_SPARSE:
            weights.update(_stored_tensor(values) for values in value.messages(SPARSE_VALUES))
        elif number == GRAPH_INPUT:
            inputs.append(_value(value))
        elif number == GRAPH_OUTPUT:
            outputs.append(_value(value))
    called = tuple(each for each in inputs if each.name not in weights)
    return Graph(called, tuple(outputs))


def _stored_tensor(tensor: Message) -> str:
    """The name of a tensor whose values are in this file; raises BadRequest when they are elsewhere."""
    name, external = "", False
    for number, value in tensor.fields():
        if number == TENSOR_NAME and isinstance(value, Message):
            name = value.text()
        elif number == TENSOR_LOCATION:
            external = value == LOCATION_EXTERNAL
    if external:
        raise BadRequest(
            f"The ONNX file keeps weights ({name!r}) in another file (external data). Save it as one file "
            "(onnx.save(model, path, save_as_external_data=False)), or, above 2 GB, deploy a Triton "
            "model directory as an archive with all the files."
        )
    return name


def _check_node(node: Message, depth: int) -> None:
    """Constants and the bodies of loops and branches may hold weights too."""
    if depth > MAX_NESTED_GRAPHS:
        raise Malformed(f"graphs nested more than {MAX_NESTED_GRAPHS} deep")
    for attribute in node.messages(NODE_ATTRIBUTE):
        for number, value in attribute.fields():
            if not isinstance(value, Message):
                continue
            if number in (ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS):
                _stored_tensor(value)
            elif number in (ATTRIBUTE_GRAPH, ATTRIBUTE_GRAPHS):
                _check_body(value, depth + 1)


def _check_body(graph: Message, depth: int) -> None:
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == GRAPH_NODE:
            _check_node(value, depth)
        elif number == GRAPH_INITIALIZER:
            _stored_tensor(value)


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
        # Some exporters write -1 or 0 for an axis of any size; a negative varint is above 2**63.
        if number == DIM_VALUE and isinstance(value, int) and 0 < value < 1 << 63:
            return value
    return None
