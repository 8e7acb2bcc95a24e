"""Small ONNX files for tests."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, helper


def value(name: str, *dims: int | str | None, datatype: int = TensorProto.FLOAT) -> Any:
    """Return a declared tensor; None or a name is a dynamic axis."""
    return helper.make_tensor_value_info(name, datatype, list(dims))


def model(
    inputs: list[Any] | None = None,
    outputs: list[Any] | None = None,
    nodes: list[Any] | None = None,
    initializers: list[Any] | None = None,
) -> ModelProto:
    """Return a model; by default x[batch, 64] -> y[batch, 64]."""
    inputs = [value("x", "batch", 64)] if inputs is None else inputs
    outputs = [value("y", "batch", 64)] if outputs is None else outputs
    nodes = [helper.make_node("Identity", ["x"], ["y"])] if nodes is None else nodes
    graph = helper.make_graph(nodes, "test", inputs, outputs, initializer=initializers or [])
    return helper.make_model(graph)


def onnx_bytes(seed: int = 0) -> bytes:
    """Return a valid file; another ``seed`` gives other bytes."""
    made = model()
    made.producer_version = str(seed)
    return bytes(made.SerializeToString())
