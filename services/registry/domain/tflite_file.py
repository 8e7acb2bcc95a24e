"""Read the inputs and outputs of a TensorFlow Lite file. Pure.

The file is a FlatBuffers message; its schema is TensorFlow Lite's schema.fbs.
"""

from __future__ import annotations

from mmap import mmap

from services.registry.domain import flatbuffer
from services.registry.domain.flatbuffer import Table
from services.registry.domain.json_outline import Malformed
from services.registry.domain.signature import GraphValue, OnnxGraph
from tidegate.kernel.protocol.models import Datatype

MODEL_SUBGRAPHS, MODEL_SIGNATURES = 2, 7
GRAPH_TENSORS, GRAPH_INPUTS, GRAPH_OUTPUTS = 0, 1, 2
TENSOR_SHAPE, TENSOR_TYPE, TENSOR_NAME, TENSOR_SHAPE_SIGNATURE = 0, 1, 3, 7
SIGNATURE_INPUTS, SIGNATURE_OUTPUTS, SIGNATURE_SUBGRAPH = 0, 1, 4
MAP_NAME, MAP_INDEX = 0, 1
_DATATYPES: dict[int, Datatype] = {
    0: "FP32", 1: "FP16", 2: "INT32", 3: "UINT8", 4: "INT64", 6: "BOOL", 7: "INT16", 9: "INT8", 10: "FP64",
    12: "UINT64", 15: "UINT32", 16: "UINT16",
}  # fmt: skip

Named = list[tuple[str, int]]


def read(data: mmap | bytes) -> OnnxGraph:
    """Return the inputs and outputs. Names are from the file's first SignatureDef, or else from the tensors.

    Raise Malformed if the file is damaged.
    """
    model = flatbuffer.root(data, 0, len(data))
    signature = next(model.tables(MODEL_SIGNATURES), None)
    number = signature.number(SIGNATURE_SUBGRAPH, 0, "<I") if signature is not None else 0
    graphs = list(model.tables(MODEL_SUBGRAPHS))
    if number >= len(graphs):
        raise Malformed("the file has no graph")
    tensors = list(graphs[number].tables(GRAPH_TENSORS))
    if signature is not None:
        inputs, outputs = _mapped(signature, SIGNATURE_INPUTS), _mapped(signature, SIGNATURE_OUTPUTS)
    else:
        inputs, outputs = (
            _listed(graphs[number], tensors, GRAPH_INPUTS),
            _listed(graphs[number], tensors, GRAPH_OUTPUTS),
        )
    ins = tuple(_value(name, _at(tensors, index)) for name, index in inputs)
    dynamic = bool(ins) and all(value.dims and value.dims[0] is None for value in ins)
    outs = tuple(_value(name, _at(tensors, index), dynamic) for name, index in outputs)
    return OnnxGraph(ins, outs, "the TensorFlow Lite model")


def _mapped(signature: Table, field: int) -> Named:
    return [(each.text(MAP_NAME), each.number(MAP_INDEX, 0, "<I")) for each in signature.tables(field)]


def _listed(graph: Table, tensors: list[Table], field: int) -> Named:
    return [(_at(tensors, index).text(TENSOR_NAME), index) for index in graph.numbers(field)]


def _at(tensors: list[Table], index: int) -> Table:
    if not 0 <= index < len(tensors):
        raise Malformed(f"the file names tensor {index}, but has only {len(tensors)} tensors")
    return tensors[index]


def _value(name: str, tensor: Table, dynamic: bool = False) -> GraphValue:
    """Return a tensor as a graph value.

    ``dynamic``: True if the inputs have a dynamic batch axis. Then a first axis of size 1 is the batch axis,
    because old converters write 1 for the batch axis of outputs.
    """
    shape = tensor.numbers(TENSOR_SHAPE_SIGNATURE, limit=64) or tensor.numbers(TENSOR_SHAPE, limit=64)
    dims = [size if size > 0 else None for size in shape]
    if dynamic and dims[:1] == [1]:
        dims[0] = None
    return GraphValue(name, "tensor", _DATATYPES.get(tensor.number(TENSOR_TYPE, 0, "<b")), tuple(dims))
