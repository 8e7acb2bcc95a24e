"""Requests as rows and columns, in the content types of other systems."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from services.gateway.api.metrics import GatewayMetrics
from services.gateway.api.rows.door import Received, RowsDoor
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import InferenceResult, Timing
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.rows import content, decoding, encoding, whole_body
from services.gateway.domain.usage_cost import UsageCost
from tests.unit.gateway.test_routing import table
from tidegate.kernel.errors import BadRequest, PayloadTooLarge, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Tensor, read_call_key
from tidegate.kernel.protocol.models import Signature
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings, unpack_strings

pytestmark = pytest.mark.unit

IMAGE = {"name": "image", "datatype": "FP32", "shape": [2]}
AGE = {"name": "age", "datatype": "INT64", "shape": []}
NAME = {"name": "name", "datatype": "BYTES", "shape": []}


def contract(*inputs: dict[str, Any], batch: int = 8) -> Contract:
    outputs = [{"name": "y", "datatype": "FP32", "shape": [1]}]
    found = {"inputs": list(inputs), "outputs": outputs, "max_batch_size": batch}
    return Contract(Signature.model_validate(found))


def floats(raw: Any) -> list[float]:
    return np.frombuffer(bytes(raw), "<f4").tolist()


def test_rows_of_the_only_input():
    found = decoding.from_rows([[1, 2], [3, 4], [5, 6]], contract(IMAGE))
    assert (found.rows, floats(found.data[0])) == (3, [1, 2, 3, 4, 5, 6])
    assert [t.dims for t in read_call_key(found.key).inputs] == [(2,)]


def test_rows_with_named_inputs_are_in_the_signatures_order():
    found = decoding.from_rows([{"name": "a", "age": 1}, {"name": "b", "age": 2}], contract(AGE, NAME))
    ages, names = found.data
    assert (np.frombuffer(bytes(ages), "<i8").tolist(), unpack_strings(bytes(names))) == (
        [1, 2],
        [b"a", b"b"],
    )


def test_mlflows_split_tables_are_rows():
    split = {"dataframe_split": {"columns": ["name", "age"], "data": [["a", 1], ["b", 2]]}}
    found = content.from_json(split, contract(AGE, NAME))
    assert np.frombuffer(bytes(found.data[0]), "<i8").tolist() == [1, 2]
    split = {"dataframe_split": {"index": [0], "columns": [0, 1], "data": [[1, 2]]}}
    assert floats(content.from_json(split, contract(IMAGE)).data[0]) == [1, 2]
    for bad in (7, {"columns": ["name"]}, {"columns": ["name"], "data": [["a", "b"]]}):
        with pytest.raises(BadRequest, match="dataframe_split"):
            content.from_json({"dataframe_split": bad}, contract(AGE, NAME))


def test_a_model_that_decodes_bodies_gets_them_whole():
    body = [{"name": name, "datatype": "BYTES", "shape": [1]} for name in ("body", "content_type", "accept")]
    signature = {"inputs": body, "outputs": body[:2], "max_batch_size": 0}
    raw = Contract(Signature.model_validate(signature))
    assert whole_body.takes_whole_body(raw)
    assert not whole_body.takes_whole_body(contract(*body))
    found = whole_body.decode(b"\x00\xff", "image/png", "", raw)
    assert [unpack_strings(bytes(each)) for each in found.data] == [
        [b"\x00\xff"], [b"image/png"], [b"application/json"],
    ]  # fmt: skip
    tensors = [Tensor(name, DATATYPES["BYTES"], (1,)) for name in ("body", "content_type")]
    for stated, sent in (
        ("text/csv; charset=utf-8",) * 2,
        ("a\r\nSet-Cookie: x", "application/octet-stream"),
    ):
        media, answer = whole_body.answer(tensors, [pack_strings([b"1,2"]), pack_strings([stated])])
        assert (media, answer) == (sent, b"1,2")


def test_columns_have_the_rows_first():
    found = decoding.from_columns({"age": [1, 2, 3]}, contract(AGE))
    assert found.rows == 3
    assert decoding.from_columns([[1, 2]], contract(IMAGE)).rows == 1


def test_a_model_without_a_batch_axis_gets_all_rows_as_one_tensor():
    grid = {"name": "grid", "datatype": "FP32", "shape": [-1, 2]}
    found = decoding.from_rows([[1, 2], [3, 4]], contract(grid, batch=0))
    assert (found.rows, floats(found.data[0])) == (0, [1, 2, 3, 4])


def test_bytes_as_base64():
    found = decoding.from_rows([{"b64": "/wA="}, "text"], contract(NAME))
    assert unpack_strings(bytes(found.data[0])) == [b"\xff\0", b"text"]


@pytest.mark.parametrize(
    ("rows", "inputs", "problem"),
    [
        ([], (IMAGE,), "at least one row"),
        ({"a": 1}, (IMAGE,), "at least one row"),
        ([[1, 2], [3]], (IMAGE,), "input 'image'"),
        ([[1, 2], [3, "x"]], (IMAGE,), "element 3"),
        ([1, 2], (AGE, NAME), "name them"),
        ([{"age": 1, "name": "a"}, {"age": 2}], (AGE, NAME), "row 1 has the inputs"),
        ([{"age": 1}], (AGE, NAME), "missing required input"),
        ([{"wrong": 1}], (AGE,), "input 'wrong' does not exist"),
        ([{"b64": "%"}], (NAME,), "not base64"),
        ([[0, 0]] * 9, (IMAGE,), "has 9 rows"),
    ],
)
def test_wrong_rows_are_refused(rows: Any, inputs: tuple[dict[str, Any], ...], problem: str):
    with pytest.raises(BadRequest, match=problem):
        decoding.from_rows(rows, contract(*inputs))


def test_before_the_signature_is_known_the_caller_shall_try_again():
    with pytest.raises(Unavailable):
        decoding.from_rows([[1]], Contract(None))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'{"instances": [[1, 2], [3, 4]]}'),
        ("application/json; charset=utf-8", b"[[1, 2], [3, 4]]"),
        ("", b'{"inputs": {"image": [[1, 2], [3, 4]]}}'),
        ("application/x-www-form-urlencoded", b'{"instances": [[1, 2], [3, 4]]}'),
        ("application/jsonlines", b'[1, 2]\n{"features": [3, 4]}\n'),
        ("text/csv", b"1,2\n3,4\n"),
        ("application/x-npy", npy(np.array([[1, 2], [3, 4]], "<f4"))),
        ("application/x-npy", npy(np.asfortranarray(np.array([[1, 2], [3, 4]], ">i2").astype("<f2")))),
    ],
)
def test_every_content_type_gives_the_same_request(kind: str, body: bytes):
    found = content.decode(kind, body, contract(IMAGE))
    assert (found.rows, floats(found.data[0])) == (2, [1, 2, 3, 4])


def test_a_table_with_a_column_for_each_input():
    found = content.decode("text/csv", b'1,"a, b"\n2,c\n', contract(AGE, NAME))
    assert unpack_strings(bytes(found.data[1])) == [b"a, b", b"c"]


def test_raw_bytes_become_one_row():
    found = content.decode("image/png", b"\x89PNG", contract(NAME))
    assert (found.rows, unpack_strings(bytes(found.data[0]))) == (1, [b"\x89PNG"])


@pytest.mark.parametrize(
    ("kind", "body", "problem"),
    [
        ("application/x-recordio-protobuf", b"", "is not supported; expected one of"),
        ("application/json", b'{"rows": []}', "neither 'instances'"),
        ("application/json", b"7", "JSON object or a list"),
        ("text/csv", b"1,x\n", "the cell 'x' is not FP32"),
        ("text/csv", b"\xff\n", "not CSV"),
        ("text/csv", b"\n\n", "no line"),
        ("application/x-npy", b"\x93NUMPY\x01", "NumPy's format"),
        ("application/x-npy", npy(np.zeros((2, 2), "<f4"))[:-1], "but 15 bytes follow"),
        ("application/x-npy", npy(np.array([{"a": 1}], object)), "Python objects"),
        ("application/x-npy", npy(np.zeros((1, 2), "<c8")), "expected FP32, got an array of complex64"),
        ("image/png", b"\x89PNG", "only a model with one input of strings accepts raw bytes"),
    ],
)
def test_wrong_bodies_are_refused(kind: str, body: bytes, problem: str):
    with pytest.raises(BadRequest, match=problem):
        content.decode(kind, body, contract(IMAGE))


def answer() -> dict[str, np.ndarray]:
    label = Tensor("label", DATATYPES["INT64"], ())
    scores = Tensor("scores", DATATYPES["FP32"], (2,))
    data = [np.array([1, 0], "<i8").tobytes(), np.array([[0.25, 0.75], [0.5, 0.5]], "<f4").tobytes()]
    return encoding.arrays([label, scores], data, 2)


def test_answers_as_rows_columns_scores_and_numbers():
    found = answer()
    assert encoding.as_rows(found)[0] == {"label": 1, "scores": [0.25, 0.75]}
    assert encoding.columns(found) == {"label": [1, 0], "scores": [[0.25, 0.75], [0.5, 0.5]]}
    assert encoding.scores(found).tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert encoding.numbers(found) == [1.0, 0.0]


def test_the_only_output_stands_for_itself_and_strings_that_are_no_text_are_base64():
    found = encoding.arrays([Tensor("t", DATATYPES["BYTES"], ())], [pack_strings([b"a", b"\xff"])], 2)
    assert encoding.as_rows(found) == ["a", {"b64": "/w=="}]


def test_answers_that_are_not_rows_are_refused_as_rows():
    found = encoding.arrays([Tensor("t", DATATYPES["FP32"], ())], [np.zeros(1, "<f4").tobytes()], 0)
    with pytest.raises(BadRequest, match="send 'inputs'"):
        encoding.as_rows(found)


@pytest.mark.parametrize(
    ("accept", "media", "body"),
    [
        ("text/csv", "text/csv", b"1,0.25,0.75\n0,0.5,0.5\n"),
        ("application/jsonlines", "application/jsonlines",
         b'{"label":1,"scores":[0.25,0.75]}\n{"label":0,"scores":[0.5,0.5]}\n'),
        ("*/*", "application/json", orjson.dumps({"predictions": encoding.as_rows(answer())})),
    ],
)  # fmt: skip
def test_answers_have_the_accepted_type(accept: str, media: str, body: bytes):
    assert content.encode(accept, answer(), rows=True) == (media, body)


def test_an_array_is_answered_in_numpys_format():
    found = {"scores": answer()["scores"]}
    media, body = content.encode("application/x-npy", found, rows=True)
    assert media == "application/x-npy"
    assert np.load(io.BytesIO(body)).tolist() == [[0.25, 0.75], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/csv", b"1,2\n"),
        ("application/x-npy", npy(np.zeros((1, 2), "<f4"))),
        ("image/png", b"\x89PNG"),
        ("application/json", b'{"image": [1, 2]}'),
    ],
)
def test_before_the_signature_is_known_every_content_type_shall_come_again(kind: str, body: bytes):
    with pytest.raises(Unavailable):
        content.decode(kind, body, Contract(None))


@pytest.mark.parametrize(
    ("kind", "body", "problem"),
    [
        ("text/csv", b"1\n" * (2**19 + 1), "lines"),
        ("text/csv", b"1\n" + b"," * (2**22 + 1), "cells"),
        ("application/jsonlines", b"1\n" * (2**19 + 1), "lines"),
        ("application/jsonlines", (b"[" + b"[]," * 1000 + b"[]]\n") * 1000, "lists; the limit is"),
    ],
)
def test_bodies_with_too_many_parts_are_refused_before_they_are_decoded(kind: str, body: bytes, problem: str):
    with pytest.raises(PayloadTooLarge, match=problem):
        content.decode(kind, body, contract(IMAGE))


def head(text: str, data: bytes = b"") -> bytes:
    """Return a body in NumPy's format with this head."""
    raw = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw + data


@pytest.mark.parametrize(
    "body",
    [
        head("{'descr': ("),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2)}", bytes(8)),
        head("{'descr': '|V0', 'fortran_order': False, 'shape': (2,)}"),
        head("{'descr': '<U0', 'fortran_order': False, 'shape': (2,)}"),
        head("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}", bytes(8)),
        head("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,)}", bytes(8)),
        head("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 9223372036854775807, 4)}"),
        head("{1: 2, 'a': 3, None: 4}"),
    ],
)
def test_a_hostile_head_of_an_array_is_refused(body: bytes):
    with pytest.raises(BadRequest):
        content.decode("application/x-npy", body, contract(IMAGE))


def test_arrays_of_strings():
    raw = content.decode("application/x-npy", npy(np.array([b"\xff", b"a"])), contract(NAME)).data[0]
    assert unpack_strings(bytes(raw)) == [b"\xff", b"a"]
    wrong = head("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"\xff\xff\xff\x7f")
    with pytest.raises(BadRequest, match="is not text"):
        content.decode("application/x-npy", wrong, contract(NAME))
    with pytest.raises(BadRequest, match="the limit is"):
        content.decode("application/x-npy", npy(np.zeros(2**20 + 1, bool)), contract(NAME))


def test_examples_share_a_context_that_is_not_too_large():
    found = decoding.examples({"context": {"age": 3}, "examples": [{}, {"age": 4}]}, contract(AGE))
    assert np.frombuffer(bytes(found.data[0]), "<i8").tolist() == [3, 4]
    names = {f"a{at}": 1 for at in range(10_000)}
    image = {"image": [[0.0] * 1000] * 10}
    for context in (names, image):
        with pytest.raises(BadRequest, match="into each of 10000 examples"):
            decoding.examples({"context": context, "examples": [{}] * 10_000}, contract(IMAGE))


def test_the_number_of_strings_is_limited_before_they_are_read():
    with pytest.raises(BadRequest, match="send fewer"):
        decoding.from_rows([["a"] * (2**21)], contract(NAME))


def test_strings_of_very_different_lengths_are_not_answered_in_numpys_format():
    found = {"t": np.array(["x" * 100_000, *["y"] * 1000], object)}
    with pytest.raises(BadRequest, match="Accept: application/json"):
        content.encode("application/x-npy", found, rows=True)


async def test_an_answer_in_rows_is_charged_to_the_callers_budget():
    """Budgets of keys need the Deployment that answered."""
    charged: list[UsageCost] = []
    route = table([1]).endpoints["digits"].targets[0]
    request = Decoded("", 1, b"", [], None, False)
    reply = Reply(b"1" * 16, envelope.OK, 0, 0, 1, 0, 1000, 1, b"", [np.zeros(1, "<f4").tobytes()])
    outputs = (Tensor("y", DATATYPES["FP32"], (1,)),)

    async def infer(*_: Any) -> InferenceResult:
        return InferenceResult(route, request, 1, outputs, {}, reply, Timing())

    core = SimpleNamespace(table=lambda: table([1]), infer=infer)
    grant = SimpleNamespace(streamed=lambda cost, received: charged.append(cost))
    access = SimpleNamespace(admit=lambda *_: grant)
    door = RowsDoor(core, access, None, GatewayMetrics(), AccessLog.off())  # type: ignore[arg-type]
    received = Received(b"[[0, 0]]", {}, None, 0.0)  # type: ignore[arg-type]
    await door.run(received, "tf_serving", "digits", "", lambda contract: request)
    assert [each.route for each in charged] == [route]


def test_answers_with_too_many_rows_or_cells_for_a_loop_are_refused():
    many = np.zeros(2**19 + 1, "<f4")
    for accept, found in (
        ("text/csv", {"y": np.zeros((2, 2**19 + 1), "<f4")}),
        ("application/jsonlines", {"y": many}),
        ("application/json", {"y": many, "z": many}),
    ):
        with pytest.raises(BadRequest, match="the answer has"):
            content.encode(accept, found, rows=True)
