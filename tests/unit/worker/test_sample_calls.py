"""Sample requests as calls of Triton, and its answers as values."""

from __future__ import annotations

import struct

import pytest

from services.worker.adapters.sample_calls import as_json, outputs_of, repeated, request_of, rows_of
from services.worker.adapters.triton_client import ModelInferResponse
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature

X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1, 2]]}
SIGNATURE = Signature.model_validate({
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [2]}],
    "max_batch_size": 8,
})  # fmt: skip


def test_a_sample_becomes_a_call_with_raw_bytes_and_parameters():
    text = {"name": "t", "datatype": "BYTES", "shape": [1, 1], "data": ["hé"]}
    made = request_of("m", {"inputs": [X, text], "parameters": {"sequence_id": 7, "sequence_start": True}})
    assert made.raw_input_contents[0] == struct.pack("<2f", 1, 2)
    assert made.raw_input_contents[1] == struct.pack("<I", 3) + "hé".encode()
    assert made.parameters["sequence_id"].int64_param == 7
    assert made.parameters["sequence_start"].bool_param is True
    assert rows_of(made, SIGNATURE) == 1
    assert rows_of(made, SIGNATURE.model_copy(update={"max_batch_size": 0})) == 1


def test_a_batch_repeats_the_rows_of_a_sample():
    made = repeated(request_of("m", {"inputs": [X]}), 3)
    assert list(made.inputs[0].shape) == [3, 2]
    assert made.raw_input_contents[0] == struct.pack("<2f", 1, 2) * 3
    assert rows_of(made, SIGNATURE) == 3


@pytest.mark.parametrize(
    "wrong", [{"name": "x"}, X | {"datatype": "FP33"}, X | {"shape": 3}, X | {"data": [1]}]
)
def test_a_sample_that_is_no_request_is_refused(wrong):
    with pytest.raises(BadRequest):
        request_of("m", {"inputs": [wrong]})


def test_outputs_become_values():
    answer = ModelInferResponse()
    answer.outputs.add(name="y", datatype="FP32", shape=[1, 2])
    answer.outputs.add(name="t", datatype="BYTES", shape=[1, 1])
    answer.raw_output_contents.extend([struct.pack("<2f", 0.5, 2), struct.pack("<I", 2) + b"ok"])
    outputs = outputs_of(answer)
    assert [(each.name, each.shape) for each in outputs] == [("y", (1, 2)), ("t", (1, 1))]
    assert as_json(outputs) == {"outputs": [{"name": "y", "data": [0.5, 2.0]}, {"name": "t", "data": ["ok"]}]}
