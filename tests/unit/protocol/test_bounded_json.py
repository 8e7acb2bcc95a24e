"""JSON from outside: what is decoded, and what is refused before it takes memory and time."""

from __future__ import annotations

import json
import tracemalloc

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.domain import generate, oip
from services.gateway.domain.batch_lines import line_id, read_object
from services.gateway.domain.contract import Contract
from tidegate.kernel.errors import BadRequest, PayloadTooLarge
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.bounded_json import MOST, JsonParts, count
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.unit

SIZE = 24 * 2**20
HOSTILE = {
    "empty keys": (b'{"":0', b',"":0', b"}"),
    "distinct keys": (b'{"a":0', None, b"}"),
    "lists": (b"[[]", b",[]", b"]"),
    "nested lists": (b"[[]", b",[[[[]]]]", b"]"),
    "objects": (b"[{}", b",{}", b"]"),
    "objects with members": (b"[{}", b',{"":0}', b"]"),
    "digits": (b"[0", b",0", b"]"),
    "strings": (b'[""', b',"ab"', b"]"),
    "escaped quotes": (b'[""', b',"\\\\"', b"]"),
}


CONTRACT = Contract(
    Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[-1])],
        outputs=[TensorSpec(name="y", datatype="FP32", shape=[-1])],
        max_batch_size=0,
    )
)


def text(kind: str) -> bytes:
    first, middle, last = HOSTILE[kind]
    if middle is None:
        return first + b"".join(b',"%x":0' % n for n in range(SIZE // 10)) + last
    return first + middle * (SIZE // len(middle)) + last


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("wrap", [b"%b", b'{"inputs": %b}'], ids=["alone", "in-a-request"])
def test_json_of_too_many_parts_is_refused_before_it_is_decoded(kind, wrap):
    body = wrap % text(kind)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge, match="send large tensors as binary data"):
            bounded_json.loads(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SIZE + 8 * 2**20, "a refusal takes at most the body a second time"


@pytest.mark.parametrize(
    "door",
    [
        lambda body: oip.parts(body, None),
        lambda body: oip.parts(body + b"tail", len(body)),
        lambda body: generate.decode(body, CONTRACT),
        read_object,
    ],
    ids=["infer", "infer with binary data", "generate", "a line of a batch"],
)
def test_every_door_of_inference_refuses_it(door):
    with pytest.raises(PayloadTooLarge):
        door(text("empty keys"))


def test_a_hostile_line_has_no_id():
    assert line_id(text("empty keys")) is None


def test_a_large_honest_tensor_is_decoded():
    values = 2_000_000
    head = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[%d],"data":[' % values
    body = head + b",".join([b"0.12345678"] * values) + b"]}]}"
    found = oip.decode(body, None, CONTRACT)
    assert len(found.data[0]) == 4 * values


def test_punctuation_inside_of_a_long_string_is_no_structure():
    document = json.dumps([{"a": [1, 2]}] * 1_000_000)
    body = orjson.dumps({"text": document, "csv": "1,2,3,\n" * 3_000_000})
    assert bounded_json.loads(body)["text"] == document


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_the_slow_decoder_of_nan_has_a_limit_of_its_own(value):
    few = f"[{'0.5,' * 200_000}{value}]".encode()
    assert len(bounded_json.loads(few)) == 200_001
    many = f"[{'0.5,' * 3_000_000}{value}]".encode()
    with pytest.raises(PayloadTooLarge, match="with NaN or Infinity at most"):
        bounded_json.loads(many)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


@given(json_values)
def test_no_part_is_missed(value):
    found = count([json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")])
    real = parts_of(value)
    assert found.values >= real.values
    assert 2 * found.strings >= real.strings
    assert found.lists >= real.lists
    assert found.objects >= real.objects
    assert found.members >= real.members


def parts_of(value) -> JsonParts:
    if isinstance(value, list):
        inner, own = [parts_of(each) for each in value], JsonParts(len(value), 0, 1, 0, 0)
    elif isinstance(value, dict):
        inner = [parts_of(each) for each in value.values()]
        own = JsonParts(2 * len(value), len(value), 0, 1, len(value))
    else:
        return JsonParts(0, isinstance(value, str), 0, 0, 0)
    return JsonParts(*map(sum, zip(own, *inner, strict=True)))


@pytest.mark.parametrize("field", ["name", "datatype", "shape", "parameters"])
def test_an_error_does_not_tell_a_large_value_back(field):
    huge = [1] * 500_000 if field == "shape" else "x" * 2_000_000
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]} | {field: huge}
    with pytest.raises(BadRequest) as caught:
        oip.decode(orjson.dumps({"inputs": [tensor]}), None, CONTRACT)
    assert len(caught.value.message) < 300
    with pytest.raises(BadRequest) as caught:
        oip.decode(orjson.dumps({"inputs": [], "parameters": {"x" * 2_000_000: None}}), None, CONTRACT)
    assert len(caught.value.message) < 300


def test_the_limits_are_what_the_documents_say():
    assert JsonParts(8_388_608, 1_114_112, 524_288, 131_072, 262_144) == MOST
