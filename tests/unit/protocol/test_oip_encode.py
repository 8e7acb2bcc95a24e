"""Answers of the Open Inference Protocol, as JSON and with binary data behind it."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest

from services.gateway.domain.contract import Decoded, WantedOutput
from services.gateway.domain.oip import encode
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.envelope import Tensor, tensor
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.unit

LABEL, SCORES = tensor("label", "INT64", ()), tensor("scores", "FP32", (2,))
LABELS, FLOATS = struct.pack("<2q", 4, -1), struct.pack("<4f", 1, 2, 0.5, -8)


def answer(
    outputs: tuple[Tensor, ...],
    data: list[Any],
    *,
    rows: int = 2,
    wanted: tuple[WantedOutput, ...] | None = None,
    binary: bool = False,
    id_: str = "",
    parameters: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], bytes]:
    """Return the JSON part and the binary data after it."""
    asked = Decoded(id_, rows, b"", [], wanted, binary)
    head, tail = encode("digits", "2", asked, rows, outputs, parameters or {}, data)
    return orjson.loads(head), b"".join(tail)


def test_json():
    head, tail = answer((LABEL, SCORES), [LABELS, memoryview(FLOATS)])
    assert head == {
        "model_name": "digits",
        "model_version": "2",
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [2], "data": [4, -1]},
            {"name": "scores", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 0.5, -8]},
        ],
    }
    assert tail == b""


def test_without_a_batch_axis():
    head, _ = answer((SCORES,), [FLOATS[:8]], rows=0)
    assert head["outputs"][0]["shape"] == [2]


def test_id_and_parameters():
    head, _ = answer((LABEL,), [LABELS], id_="seven", parameters={"took": 3})
    assert (head["id"], head["parameters"]) == ("seven", {"took": 3})


def test_binary():
    head, tail = answer((LABEL, SCORES), [LABELS, memoryview(FLOATS)], binary=True)
    assert [o["parameters"]["binary_data_size"] for o in head["outputs"]] == [16, 16]
    assert all("data" not in output for output in head["outputs"])
    assert tail == LABELS + FLOATS


def test_binary_without_a_byte_is_plain_json():
    asked = Decoded("", 0, b"", [], None, True)
    scores = tensor("scores", "FP32", (0, 2))
    body, tail = encode("digits", "2", asked, 0, (scores,), {}, [b""])
    assert tail == []
    (output,) = orjson.loads(body)["outputs"]
    assert (output["shape"], output["parameters"]) == ([0, 2], {"binary_data_size": 0})


def test_each_output_in_its_own_form():
    wanted = (WantedOutput("scores", True), WantedOutput("label", False))
    head, tail = answer((LABEL, SCORES), [LABELS, FLOATS], wanted=wanted)
    assert head["outputs"][0]["data"] == [4, -1]
    assert head["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert tail == FLOATS
    head, tail = answer(
        (LABEL, SCORES), [LABELS, FLOATS], wanted=(WantedOutput("label", False),), binary=True
    )
    assert tail == FLOATS, "what was not named has the request's form"


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_are_binary_or_refused(datatype):
    """JSON has no such numbers; Triton refuses them as well."""
    raw = np.array([0.5], "<f2").tobytes()
    head, tail = answer((tensor("h", datatype, ()),), [raw], rows=1, binary=True)
    assert (head["outputs"][0]["parameters"], tail) == ({"binary_data_size": 2}, raw)
    with pytest.raises(BadRequest, match="output 'h': BF16 and FP16 cannot be sent as JSON; request binary"):
        answer((tensor("h", datatype, ()),), [raw], rows=1)


def test_what_is_no_number_is_named_as_triton_names_it():
    asked = Decoded("", 0, b"", [], None, False)
    raw = struct.pack("<4f", float("nan"), float("inf"), float("-inf"), 0.1)
    body, _ = encode("m", "1", asked, 0, (tensor("v", "FP32", (4,)),), {"null": "x"}, [raw])
    assert b'"data":[NaN,Infinity,-Infinity,0.10000000149011612]' in body
    assert json.loads(body)["parameters"] == {"null": "x"}


def test_strings():
    head, _ = answer((tensor("t", "BYTES", ()),), [pack_strings(["a", "größe"])])
    assert head["outputs"][0]["data"] == ["a", "größe"]


def test_strings_that_are_no_text_are_answered_too():
    """JSON cannot carry them: they come as binary data."""
    raw = pack_strings([b"\xff\xfe", b"ok"])
    head, tail = answer((tensor("t", "BYTES", ()),), [raw])
    assert (head["outputs"][0]["parameters"], tail) == ({"binary_data_size": len(raw)}, raw)


@pytest.mark.parametrize(
    ("datatype", "raw", "shown"),
    [
        ("BOOL", b"\0\1", [False, True]),
        ("UINT64", struct.pack("<Q", 2**64 - 1), [2**64 - 1]),
        ("FP64", struct.pack("<d", 1e308), [1e308]),
        ("INT8", b"", []),
    ],
)
def test_values(datatype, raw, shown):
    head, _ = answer((tensor("v", datatype, (-1,)),), [raw], rows=0)
    assert head["outputs"][0]["data"] == shown
