"""TensorFlow's tensors: what a real client sends, short lists, and wrong ones."""

from __future__ import annotations

import base64
from typing import Any, cast

import numpy as np
import pytest

from services.gateway.api.grpc import tf_serving
from services.gateway.api.grpc.tf_messages import MESSAGES
from services.gateway.domain.tf_tensors import KINDS, columns, proto_of, raw_of
from tidegate.kernel.errors import BadRequest, PayloadTooLarge
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.unit

# A PredictRequest that min-tfs-client 1.0.2 made.
REAL = base64.b64decode(
    "ChgKAW0SAggDGg9zZXJ2aW5nX2RlZmF1bHQSEQoBYhIMCAoSBBICCAJaAgEAEiMKAWYSHggBEggSAggCEgIIAioQAADAPwAAAMAAAEBA"
    "AACAQBIQCgFpEgsICRIEEgIIAVIBBxIaCgF1EhUIFxIEEgIIAYoBCoGAgICAgICAgAE="
)
MOST = 1 << 20


def proto(dtype: int, shape: list[int], **fields: Any) -> Any:
    made = MESSAGES["TensorProto"](dtype=dtype, **fields)
    for size in shape:
        made.tensor_shape.dim.add(size=size)
    return made


def test_a_request_of_a_real_client_is_read() -> None:
    request = MESSAGES["PredictRequest"].FromString(REAL)
    spec = request.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 3, "serving_default")
    found = {name: raw_of(name, tensor, MOST) for name, tensor in request.inputs.items()}
    assert found == {
        "b": ("BOOL", [2], b"\x01\x00"),
        "f": ("FP32", [2, 2], np.array([1.5, -2, 3, 4], "<f4").tobytes()),
        "i": ("INT64", [1], (7).to_bytes(8, "little")),
        "u": ("UINT64", [1], (2**63 + 1).to_bytes(8, "little")),
    }


@pytest.mark.parametrize("number", sorted(KINDS))
def test_every_datatype_goes_there_and_back(number: int) -> None:
    kind = KINDS[number]
    raw = pack_strings([b"a", b""]) if kind.name == "BYTES" else np.array([1, 0], kind.numpy).tobytes()
    made = MESSAGES["TensorProto"]()
    proto_of(made, kind.name, [2, 1], raw)
    assert (made.dtype, made.tensor_content, len(getattr(made, kind.values))) == (number, b"", 2)
    assert raw_of("x", made, MOST) == (kind.name, [2, 1], raw)


def test_a_short_list_repeats_its_last_value() -> None:
    floats = np.array([1, 2, 2, 2], "<f4").tobytes()
    assert raw_of("x", proto(1, [4], float_val=[1, 2]), MOST)[2] == floats
    assert raw_of("x", proto(1, [2, 2]), MOST)[2] == bytes(16)
    half = np.array([1.5], "<f2")
    assert raw_of("x", proto(19, [2], half_val=half.view("<u2").tolist()), MOST)[2] == half.tobytes() * 2
    assert raw_of("x", proto(7, [3], string_val=[b"a", b"b"]), MOST)[2] == pack_strings([b"a", b"b", b"b"])
    assert raw_of("x", proto(3, [], int_val=[-1]), MOST) == ("INT32", [], b"\xff" * 4)


@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (proto(8, [1]), BadRequest, "is not supported"),
        (proto(0, [1]), BadRequest, "is not supported"),
        (proto(1, [-1]), BadRequest, "known shape"),
        (proto(1, [1] * 17), BadRequest, "known shape"),
        (proto(1, [2], float_val=[1, 2, 3]), BadRequest, "needs 2 values, got 3"),
        (proto(1, [2], tensor_content=b"1234"), BadRequest, "needs 8 bytes, got 4"),
        (proto(6, [1], int_val=[300]), BadRequest, "does not fit into INT8"),
        (proto(7, [2]), BadRequest, "needs 2 strings, got 0"),
        (proto(1, [2**40], float_val=[1]), PayloadTooLarge, "the limit for all"),
        (proto(7, [2**40], string_val=[b"a"]), BadRequest, "elements"),
        (proto(7, [2**20], string_val=[b"a" * 1000]), PayloadTooLarge, "the limit for all inputs"),
    ],
)
def test_wrong_tensors_are_refused_without_much_memory(tensor: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        raw_of("x", tensor, MOST)


def examples(*given: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for features in given:
        example = MESSAGES["Example"]()
        for name, value in features.items():
            kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(value[0])]
            getattr(example.features.feature[name], kind).value.extend(value)
        made.append(dict(example.features.feature))
    return made


def test_examples_become_columns() -> None:
    found = columns(
        examples({"a": [1.0, 2.0], "s": [b"x"]}, {"a": [3.0, 4.0], "s": [b"y"]}), {"a": "FP64", "s": "BYTES"}
    )
    assert found["a"].dtype == np.float64
    assert found["a"].tolist() == [[1, 2], [3, 4]]
    assert found["s"].tolist() == [[b"x"], [b"y"]]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "no example"),
        ([{"z": [1.0]}], "'z' does not exist"),
        ([{"a": [1.0]}, {"a": [1.0, 2.0]}], "same number of values"),
        ([{"a": [1.0]}, {}], "same number of values"),
        ([{"a": [b"text"]}], "of another kind"),
        ([{"a": [1.0]}, {"a": [1.0], "s": [b"x"]}], "must have the features"),
    ],
)
def test_wrong_examples_are_refused(given: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        columns(examples(*given), {"a": "FP32", "s": "BYTES"})


@pytest.mark.parametrize(
    ("datatype", "value", "text"),
    [
        ("BF16", 1.5, "of another kind"),
        ("INT32", 1.5, "of another kind"),
        ("INT8", 300, "does not fit into INT8"),
    ],
)
def test_numbers_that_a_datatype_lacks_are_refused(datatype: str, value: float, text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        columns(examples({"a": [value]}), {"a": datatype})


async def test_the_inputs_of_a_request_have_one_limit() -> None:
    serving = tf_serving.TfServing(cast(Any, None), cast(Any, None), max_bytes=1000)
    request = MESSAGES["PredictRequest"]()
    for name in "ab":
        request.inputs[name].CopyFrom(proto(1, [150]))
    with pytest.raises(PayloadTooLarge, match="only 400 are left of the limit for all inputs"):
        await serving.predict(request, None)


def test_the_context_counts_for_each_example() -> None:
    given = MESSAGES["Input"]()
    for _ in range(4096):
        given.example_list_with_context.examples.add()
    for at in range(300):
        given.example_list_with_context.context.features.feature[str(at)].SetInParent()
    with pytest.raises(BadRequest, match="all examples together"):
        tf_serving._features(given)
