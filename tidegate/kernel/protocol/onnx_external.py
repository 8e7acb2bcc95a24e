"""Find the weights that an ONNX file keeps in other files. Pure.

Field numbers are those of onnx.proto3. A field can occur several times, and ONNX libraries differ in which
occurrence they use. So a tensor is treated as external if any occurrence marks it as external.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tidegate.kernel.protocol.protobuf_wire import Malformed, Message

MODEL_GRAPH, MODEL_TRAINING, MODEL_FUNCTIONS = 7, 20, 25
TRAINING_GRAPHS = (1, 2)
FUNCTION_NODE, FUNCTION_ATTRIBUTE = 7, 11
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_ATTRIBUTE = 5
ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS, ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
TENSOR_NAME, TENSOR_EXTERNAL_DATA, TENSOR_LOCATION = 8, 13, 14
SPARSE_TENSORS = (1, 2)
ENTRY_KEY, ENTRY_VALUE = 1, 2
MAX_NESTED_GRAPHS = 32


@dataclass(frozen=True, slots=True)
class External:
    """A tensor whose values are in the file ``location``.

    ``end``: the byte offset in the file at which the values end, so the file must have at least this size; 0:
    the offset is unknown, because the tensor states no length.
    """

    tensor: str
    location: str
    end: int = 0


def externals(model: Message) -> Iterator[External]:
    """Yield every tensor of a ModelProto whose values are in another file.

    Raise Malformed if such a tensor names no file.
    """
    for number, value in model.fields():
        if not isinstance(value, Message):
            continue
        if number == MODEL_GRAPH:
            yield from _graph(value, 0)
        elif number == MODEL_FUNCTIONS:
            for part, inner in value.fields():
                if part == FUNCTION_NODE and isinstance(inner, Message):
                    yield from _node(inner, 0)
                elif part == FUNCTION_ATTRIBUTE and isinstance(inner, Message):
                    yield from _attribute(inner, 0)
        elif number == MODEL_TRAINING:
            for part, inner in value.fields():
                if part in TRAINING_GRAPHS and isinstance(inner, Message):
                    yield from _graph(inner, 1)


def _graph(graph: Message, depth: int) -> Iterator[External]:
    for number, value in graph.fields():
        if not isinstance(value, Message):
            continue
        if number == GRAPH_NODE:
            yield from _node(value, depth)
        elif number == GRAPH_INITIALIZER:
            yield from _tensor(value)
        elif number == GRAPH_SPARSE:
            yield from _sparse(value)


def _node(node: Message, depth: int) -> Iterator[External]:
    """Yield the external tensors among a node's constants, and in the bodies of its loops and branches."""
    if depth > MAX_NESTED_GRAPHS:
        raise Malformed(f"graphs are nested more than {MAX_NESTED_GRAPHS} levels deep")
    for attribute in node.messages(NODE_ATTRIBUTE):
        yield from _attribute(attribute, depth)


def _attribute(attribute: Message, depth: int) -> Iterator[External]:
    for number, value in attribute.fields():
        if not isinstance(value, Message):
            continue
        if number in ATTRIBUTE_TENSORS:
            yield from _tensor(value)
        elif number in ATTRIBUTE_SPARSE:
            yield from _sparse(value)
        elif number in ATTRIBUTE_GRAPHS:
            yield from _graph(value, depth + 1)


def _sparse(sparse: Message) -> Iterator[External]:
    for number, part in sparse.fields():
        if number in SPARSE_TENSORS and isinstance(part, Message):
            yield from _tensor(part)


def _tensor(tensor: Message) -> Iterator[External]:
    name, external = "", False
    locations: list[str] = []
    ends = [0, 0]
    for number, value in tensor.fields():
        if number == TENSOR_NAME and isinstance(value, Message):
            name = value.text()
        elif number == TENSOR_EXTERNAL_DATA or (number == TENSOR_LOCATION and value != 0):
            external = True  # one such field is enough
        if number == TENSOR_EXTERNAL_DATA and isinstance(value, Message):
            _entry(value, locations, ends)
    if external and not locations:
        raise Malformed(f"the tensor {name!r} is external data but names no file")
    end = sum(ends) if ends[1] else 0
    yield from (External(name, location, end) for location in locations)


def _entry(entry: Message, locations: list[str], ends: list[int]) -> None:
    """Add an entry's value to ``locations`` or store it in ``ends``, as the entry's key says.

    ``ends[0]`` is the offset in bytes, and ``ends[1]`` is the length in bytes.
    """
    keys = {text.text() for text in entry.messages(ENTRY_KEY)}
    values = [text.text() for text in entry.messages(ENTRY_VALUE)]
    if "location" in keys:
        locations += values
    for at, key in enumerate(("offset", "length")):
        if key in keys:
            numbers = [int(value) for value in values if value.isdecimal() and len(value) < 20]
            ends[at] = max([ends[at], *numbers])
