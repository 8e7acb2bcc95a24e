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

MODEL_IR_VERSION, MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTIONS = 1, 7, 20, 25
TRAINING_GRAPHS = (1, 2)
FUNCTION_NODE, FUNCTION_ATTRIBUTE = 7, 11
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 5, 11, 12, 15
NODE_ATTRIBUTE = 5
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
TENSOR_NAME, TENSOR_EXTERNAL_DATA, TENSOR_LOCATION = 8, 13, 14
SPARSE_TENSORS = (1, 2)
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
            model = Message(data, 0, len(data), Budget())
            _check_others(model)
            return _graph(_main_graph(model))
        except Malformed as error:
            raise BadRequest(f"The file is not an ONNX model ({error}).") from None


def _main_graph(model: Message) -> Message:
    graph, versioned = None, False
    for number, value in model.fields():
        if number == MODEL_GRAPH and isinstance(value, Message):
            if graph is not None:  # a reader puts them together into one
                raise Malformed("it has two graphs")
            graph = value
        versioned = versioned or (number == MODEL_IR_VERSION and isinstance(value, int))
    if graph is None or not versioned:
        raise Malformed("it has no graph" if versioned else "it has no IR version")
    return graph


def _check_others(model: Message) -> None:
    """Functions, which nodes call, and what is for training hold nodes and weights too."""
    for number, value in model.fields():
        if not isinstance(value, Message):
            continue
        if number == MODEL_FUNCTIONS:
            for part, inner in value.fields():
                if part == FUNCTION_NODE and isinstance(inner, Message):
                    _check_node(inner, 0)
                elif part == FUNCTION_ATTRIBUTE and isinstance(inner, Message):
                    _check_attribute(inner, 0)
        elif number == MODEL_TRAINING:
            for part, inner in value.fields():
                if part in TRAINING_GRAPHS and isinstance(inner, Message):
                    _check_body(inner, 1)


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
            weights.update(_stored_sparse(value))
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
        elif number == TENSOR_EXTERNAL_DATA or (number == TENSOR_LOCATION and value != 0):
            external = True  # one is enough, whatever comes after it
    if external:
        raise BadRequest(
            f"The ONNX file keeps weights ({name!r}) in another file (external data). Save it as one file "
            "(onnx.save(model, path, save_as_external_data=False)), or, above 2 GB, deploy a Triton "
            "model directory as an archive with all the files."
        )
    return name


def _stored_sparse(sparse: Message) -> list[str]:
    """The names of a sparse tensor's parts, its values and their places; as :func:`_stored_tensor`."""
    return [
        _stored_tensor(part)
        for number, part in sparse.fields()
        if number in SPARSE_TENSORS and isinstance(part, Message)
    ]


def _check_node(node: Message, depth: int) -> None:
    """Constants and the bodies of loops and branches may hold weights too."""
    if depth > MAX_NESTED_GRAPHS:
        raise Malformed(f"graphs nested more than {MAX_NESTED_GRAPHS} deep")
    for attribute in node.messages(NODE_ATTRIBUTE):
        _check_attribute(attribute, depth)


def _check_attribute(attribute: Message, depth: int) -> None:
    for number, value in attribute.fields():
        if not isinstance(value, Message):
            continue
        if number in ATTRIBUTE_TENSORS:
            _stored_tensor(value)
        elif number in ATTRIBUTE_SPARSE:
            _stored_sparse(value)
        elif number in ATTRIBUTE_GRAPHS:
            _check_body(value, depth + 1)


def _check_body(graph: Message, depth: int) -> None:
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == GRAPH_NODE:
            _check_node(value, depth)
        elif number == GRAPH_INITIALIZER:
            _stored_tensor(value)
        elif number == GRAPH_SPARSE:
            _stored_sparse(value)


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
