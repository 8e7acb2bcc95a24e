"""ONNX files that keep weights elsewhere: found wherever they are said to, and however often a field comes.

The oracle is Google's own parser, through the ``onnx`` package: what it takes for external, we refuse.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from services.registry.adapters import onnx_signature
from tests.integration.registry.onnx_files import model, onnx_bytes, value
from tidegate.kernel.errors import BadRequest

pytestmark = pytest.mark.unit


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(4, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found += bytes((number & 0x7F | 0x80,))
        number >>= 7
    return found + bytes((number,))


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


TENSOR = external().SerializeToString()
BARE = numpy_helper.from_array(np.ones(4, np.float32), "w").SerializeToString()
CONSTANT = helper.make_node("Constant", [], ["c"], value=external()).SerializeToString()


def with_attribute(attribute: AttributeProto) -> bytes:
    node = helper.make_node("Custom", ["x"], ["y"])
    node.attribute.append(attribute)
    return model(nodes=[node]).SerializeToString()


def sparse(*, indices: bool) -> AttributeProto:
    attribute = AttributeProto(name="s", type=AttributeProto.SPARSE_TENSOR)
    (attribute.sparse_tensor.indices if indices else attribute.sparse_tensor.values).CopyFrom(external())
    return attribute


def with_sparse_initializer(*, indices: bool) -> bytes:
    made = model()
    made.graph.sparse_initializer.append(sparse(indices=indices).sparse_tensor)
    return made.SerializeToString()


def with_body_of_sparse() -> bytes:
    body = helper.make_graph([], "body", [], [value("c", 4)])
    body.sparse_initializer.append(sparse(indices=False).sparse_tensor)
    return model(nodes=[helper.make_node("If", ["x"], ["y"], then_branch=body)]).SerializeToString()


def with_tensor(tensor: bytes) -> bytes:
    """Return a model with this initializer, as bytes."""
    return _in_one_graph(field(5, tensor))


def _in_one_graph(more: bytes) -> bytes:
    made = model()
    graph = made.graph.SerializeToString()
    made.ClearField("graph")
    return made.SerializeToString() + field(7, graph + more)


HIDDEN = {
    "in a second graph": onnx_bytes() + field(7, field(5, TENSOR)),
    "in the first of two graphs": field(7, field(5, TENSOR)) + onnx_bytes(),
    "in a node of a function": onnx_bytes() + field(25, field(7, CONSTANT)),
    "in a default of a function": onnx_bytes()
    + field(25, field(11, helper.make_attribute("a", external()).SerializeToString())),
    "in a graph for training": onnx_bytes() + field(20, field(2, field(5, TENSOR))),
    "in an initialization for training": onnx_bytes() + field(20, field(1, field(1, CONSTANT))),
    "in a sparse attribute": with_attribute(sparse(indices=False)),
    "in the indices of a sparse attribute": with_attribute(sparse(indices=True)),
    "in a sparse initializer": with_sparse_initializer(indices=False),
    "in the indices of a sparse initializer": with_sparse_initializer(indices=True),
    "in a sparse initializer of a branch": with_body_of_sparse(),
    "by a location of 33 bits": with_tensor(BARE + field(14, 2**32 + 1) + field(13, b"")),
    "by a location and then one of another wire type": with_tensor(TENSOR + field(14, b"\0")),
    "by the first of an attribute's two tensors": _in_one_graph(
        field(1, field(5, field(5, TENSOR) + field(5, field(8, b"other"))))
    ),
    "by parts of a tensor that are put together": _in_one_graph(
        field(1, field(5, field(5, BARE) + field(5, field(14, 1) + field(13, field(1, b"location")))))
    ),
}


def read(tmp_path: Path, raw: bytes):
    (tmp_path / "model").write_bytes(raw)
    return onnx_signature.read(tmp_path / "model")


@pytest.mark.parametrize("raw", HIDDEN.values(), ids=HIDDEN)
def test_external_data_is_found_everywhere(tmp_path, raw):
    with pytest.raises(BadRequest, match=r"external data|two graphs"):
        read(tmp_path, raw)


def test_a_key_of_more_than_32_bits_is_no_field(tmp_path):
    """Some readers cut the key, and so see a graph where others see an unknown field."""
    hidden = varint((1 << 35) | 7 << 3 | 2)
    content = field(5, TENSOR)
    with pytest.raises(BadRequest, match="field number"):
        read(tmp_path, onnx_bytes() + hidden + varint(len(content)) + content)


def test_a_normal_model_is_read(tmp_path):
    made = model(initializers=[numpy_helper.from_array(np.ones(4, np.float32), "w")])
    made.graph.initializer[0].data_location = TensorProto.DEFAULT
    made.functions.add(name="f", domain="d").node.append(helper.make_node("Identity", ["a"], ["b"]))
    assert [each.name for each in read(tmp_path, made.SerializeToString()).inputs] == ["x"]


# --- made-up files ----------------------------------------------------------------------------------------

SEEDS = [*HIDDEN.values(), onnx_bytes(), _in_one_graph(field(5, BARE))]
PARTS = [field(14, 1), field(14, 0), field(14, 2**32 + 1), field(13, b""), field(5, TENSOR), field(7, b"")]


@st.composite
def tampered(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(raw) - 1))
        kind = draw(st.sampled_from(["set", "cut", "put", "append"]))
        if kind == "set":
            raw[at] = draw(st.integers(0, 255) | st.sampled_from(list(raw)))
        elif kind == "cut" and len(raw) > 40:
            del raw[at : at + draw(st.integers(1, 3))]
        elif kind == "put":
            raw[at:at] = draw(st.sampled_from(PARTS))
        else:
            raw += draw(st.sampled_from(PARTS))
    return bytes(raw)


def tensors_of(message) -> list[TensorProto]:
    """Yield every TensorProto in a message, at any depth."""
    found = [message] if isinstance(message, TensorProto) else []
    for descriptor, content in message.ListFields():
        if descriptor.message_type is None:
            continue
        for each in content if not hasattr(content, "ListFields") else [content]:
            found += tensors_of(each)
    return found


@pytest.mark.fuzz
@given(raw=tampered() | st.binary(max_size=200))
def test_accepted_models_have_no_external_data_for_any_reader(raw, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    try:
        read(folder, raw)
    except BadRequest:
        return
    parsed = ModelProto()
    try:
        parsed.ParseFromString(raw)
    except Exception:
        return  # what nobody can load does no harm
    assert not [each.name for each in tensors_of(parsed) if each.data_location == TensorProto.EXTERNAL]
