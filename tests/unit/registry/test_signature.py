from __future__ import annotations

import pytest

from services.registry.domain.signature import GraphValue, OnnxGraph, of_graph
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature, TensorSpec


def tensor(name: str, *dims: int | None, datatype="FP32") -> GraphValue:
    return GraphValue(name, "tensor", datatype, dims)


def graph(inputs: list[GraphValue], outputs: list[GraphValue]) -> OnnxGraph:
    return OnnxGraph(tuple(inputs), tuple(outputs))


def test_batch_axis_is_found_and_left_out():
    found = of_graph(graph([tensor("x", None, 64)], [tensor("label", None), tensor("p", None, 10)]), None, 64)
    assert found.max_batch_size == 64
    assert [t.shape for t in found.inputs + found.outputs] == [[64], [], [10]]


@pytest.mark.parametrize(
    "outputs", [[tensor("y", 1, 10)], [tensor("y")], [tensor("y", None, 2), tensor("z", 3, 2)]]
)
def test_one_value_without_it_means_no_batch_axis(outputs):
    found = of_graph(graph([tensor("x", None, 64)], outputs), None, 64)
    assert found.max_batch_size == 0
    assert found.inputs[0].shape == [-1, 64]


def test_zipmap_is_refused_with_the_remedy():
    zipmap = GraphValue("output_probability", "sequence", None, None)
    with pytest.raises(BadRequest, match="zipmap"):
        of_graph(graph([tensor("x", None, 64)], [zipmap]), None, 64)


@pytest.mark.parametrize(
    ("inputs", "outputs", "match"),
    [
        ([], [tensor("y", 1)], "no input"),
        ([tensor("x", 1)], [], "no output"),
        ([tensor("x", 1, datatype=None)], [tensor("y", 1)], "element type"),
        ([GraphValue("x", "tensor", "FP32", None)], [tensor("y", 1)], "Add a signature"),
        ([tensor("x", 1), tensor("x", 1)], [tensor("y", 1)], "more than once"),
    ],
)
def test_graphs_without_a_usable_signature(inputs, outputs, match):
    with pytest.raises(BadRequest, match=match):
        of_graph(graph(inputs, outputs), None, 64)


def given(shape: list[int], *, datatype="FP32", name="x", batch=0) -> Signature:
    return Signature(
        inputs=[TensorSpec(name=name, datatype=datatype, shape=shape)],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[2])],
        max_batch_size=batch,
    )


def test_given_signature_may_narrow_what_the_graph_leaves_open():
    open_graph = graph([tensor("x", None, None)], [GraphValue("y", "tensor", "FP32", None)])
    assert of_graph(open_graph, given([8], batch=4), 64).max_batch_size == 4
    assert of_graph(open_graph, given([3, 8]), 64).inputs[0].shape == [3, 8]


@pytest.mark.parametrize(
    ("signature", "match"),
    [
        (given([64], name="z", batch=4), "inputs are 'z', but those of the ONNX graph are 'x'"),
        (given([64], datatype="INT64", batch=4), "is INT64, but the ONNX graph says FP32"),
        (given([65], batch=4), "the shape"),
        (given([64]), "the shape"),
    ],
)
def test_given_signature_must_agree(signature, match):
    with pytest.raises(BadRequest, match=match):
        of_graph(graph([tensor("x", None, 64)], [tensor("y", None, 2)]), signature, 64)
