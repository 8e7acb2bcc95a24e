"""The calls of the warm-up."""

import pytest

from services.worker.adapters.warmup import batch_sizes, zeros
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.unit


def signature(*inputs: TensorSpec, rows: int) -> Signature:
    return Signature(
        inputs=list(inputs), outputs=[TensorSpec(name="y", datatype="FP32", shape=[1])], max_batch_size=rows
    )


FIXED = TensorSpec(name="x", datatype="FP16", shape=[3, 4])
FREE = TensorSpec(name="text", datatype="BYTES", shape=[-1])


def test_batch_sizes() -> None:
    assert batch_sizes(signature(FIXED, rows=8)) == [1, 8]
    assert batch_sizes(signature(FIXED, rows=8), max_batch=4) == [1, 4]
    assert batch_sizes(signature(FIXED, rows=0)) == [1]
    assert batch_sizes(signature(FIXED, FREE, rows=8)) == [1]
    huge = TensorSpec(name="x", datatype="FP32", shape=[4096, 1024])
    assert batch_sizes(signature(huge, rows=8)) == [1]


def test_zeros() -> None:
    request = zeros("m", signature(FIXED, FREE, rows=8), 2)
    assert [(t.name, t.datatype, list(t.shape)) for t in request.inputs] == [
        ("x", "FP16", [2, 3, 4]),
        ("text", "BYTES", [2, 1]),
    ]
    assert list(request.raw_input_contents) == [bytes(48), bytes(8)]


def test_zeros_without_a_batch_axis() -> None:
    request = zeros("m", signature(FIXED, rows=0), 1)
    assert list(request.inputs[0].shape) == [3, 4]
