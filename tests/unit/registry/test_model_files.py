"""What files of XGBoost, LightGBM, CatBoost, TensorFlow Lite and skops say, read without their libraries."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.domain import (
    catboost_file,
    flatbuffer,
    json_outline,
    lightgbm_file,
    needs,
    skops_types,
    tflite_file,
    trees,
    xgboost_file,
)
from services.registry.domain.json_outline import Malformed, pick_ubj
from services.registry.domain.skops_types import SkopsType
from services.registry.domain.trees import TreeModel
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature, TensorSpec

# --- documents -------------------------------------------------------------------------------------------


def ubj(value: Any, *, typed: bool = True) -> bytes:
    """Return a value as UBJSON, as XGBoost writes it: arrays of numbers are typed and counted."""
    if isinstance(value, dict):
        fields = (ubj(key)[1:] + ubj(each, typed=typed) for key, each in value.items())
        return b"{" + b"".join(fields) + b"}"
    if isinstance(value, str):
        return b"SL" + struct.pack(">q", len(value.encode())) + value.encode()
    if isinstance(value, int):
        return b"l" + struct.pack(">i", value)
    if typed and value and all(isinstance(each, int) for each in value):
        return b"[$l#L" + struct.pack(">q", len(value)) + struct.pack(f">{len(value)}i", *value)
    return b"[#L" + struct.pack(">q", len(value)) + b"".join(ubj(each, typed=typed) for each in value)


def test_values_without_bytes_count_too():
    nothing = b"[$N#l" + struct.pack(">i", 500_000)
    made = b"{L" + struct.pack(">q", 7) + b"version[#l" + struct.pack(">i", 20) + nothing * 20 + b"}"
    with pytest.raises(Malformed, match="need more than"):
        pick_ubj(made, {("version",)})


def document(objective: str = "reg:squarederror", classes: int = 0, targets: int = 1, **more: Any) -> Any:
    parameters = {"num_feature": "4", "num_class": str(classes), "num_target": str(targets)}
    return {
        "learner": {
            "attributes": {"note": 'a "quoted" {text}'},
            "feature_names": ["a", "b", "c", "d"],
            "gradient_booster": {"model": {"trees": [{"left": [1, -1, -1]}]}, "name": "gbtree"},
            "learner_model_param": parameters,
            "objective": {"name": objective},
            **more,
        },
        "version": [3, 2, 0],
    }


FORMS = [lambda value: json.dumps(value).encode(), lambda value: json.dumps(value, indent=2).encode(), ubj]


@pytest.mark.parametrize("form", FORMS)
def test_xgboost(form):
    facts = xgboost_file.read(form(document("multi:softprob", 3)))
    assert (facts.features, facts.classes, facts.objective, facts.saved_by) == (
        4,
        3,
        "multi:softprob",
        (3, 2, 0),
    )
    assert facts.names == ("a", "b", "c", "d")


OUTPUTS = [
    (document("binary:logistic"), {"label": [], "probabilities": [2]}),
    (document("multi:softprob", 3), {"label": [], "probabilities": [3]}),
    (document("multi:softmax", 3), {"output": []}),
    (document("reg:squarederror"), {"output": []}),
    (document("binary:logitraw"), {"output": []}),
    (document("mine", 3), {"output": [3]}),
    (document("reg:squarederror", targets=2), {"output": [2]}),
]


@pytest.mark.parametrize(("made", "outputs"), OUTPUTS)
def test_outputs_of_xgboost(made, outputs):
    model = xgboost_file.model_of(xgboost_file.read(ubj(made)))
    found = trees.signature_of(model, None, 64)
    assert {tensor.name: tensor.shape for tensor in found.outputs} == outputs
    assert [(t.name, t.datatype, t.shape) for t in found.inputs] == [("input", "FP32", [4])]
    assert found.max_batch_size == 64


def test_untyped_arrays_of_ubjson():
    assert xgboost_file.read(ubj(document(), typed=False)).features == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.fuzz
@given(data=st.data())
def test_a_changed_document_never_breaks_the_reader(form, data):
    content = bytearray(form(document("binary:logistic")))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Malformed, BadRequest):
        facts = xgboost_file.read(bytes(content[: data.draw(st.integers(1, len(content)))]))
        trees.signature_of(xgboost_file.model_of(facts), None, 64)


@pytest.mark.fuzz
@given(
    st.recursive(
        st.text(max_size=9) | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    )
)
def test_the_outline_finds_what_json_finds(value):
    found = json_outline.pick_json(
        json.dumps({"a": {"b": [value]}, "c": value}).encode(), {("a", "b"), ("c",)}
    )
    assert found[("a", "b")] == [value]
    assert ("c",) not in found if isinstance(value, int) else found[("c",)] == value


def test_objects_of_a_document():
    text = b'{"k": "outer", "x": {"k": "first", "k": "last"}, "y": [{"k": 5}], "z": ["k"]}'
    assert list(json_outline.objects(text, frozenset({"k"}))) == [
        {"k": "last"}, {"k": None}, {}, {}, {"k": "outer"},
    ]  # fmt: skip


# --- LightGBM --------------------------------------------------------------------------------------------


def lightgbm(**fields: Any) -> bytes:
    given = {"num_class": 1, "num_tree_per_iteration": 1, "max_feature_idx": 3} | fields
    lines = [f"{key}={value}" for key, value in given.items()]
    return "\n".join(
        ["tree", "version=v4", *lines, "", "Tree=0", "num_leaves=2", "", "end of trees", ""]
    ).encode()


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"objective": "binary sigmoid:1"}, {"label": [], "probabilities": [2]}),
        ({"objective": "multiclass num_class:3", "num_class": 3}, {"label": [], "probabilities": [3]}),
        ({"objective": "regression"}, {"output": []}),
        ({}, {"output": []}),
        ({"num_class": 3, "num_tree_per_iteration": 3}, {"output": [3]}),
    ],
)
def test_lightgbm(fields, outputs):
    found = trees.signature_of(lightgbm_file.read(lightgbm(**fields)), None, 8)
    assert {tensor.name: tensor.shape for tensor in found.outputs} == outputs
    assert (found.inputs[0].datatype, found.inputs[0].shape) == ("FP64", [4])


@pytest.mark.fuzz
@given(data=st.data())
def test_a_changed_lightgbm_file_never_breaks_the_reader(data):
    content = bytearray(lightgbm(objective="binary"))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Malformed, BadRequest):
        trees.signature_of(lightgbm_file.read(bytes(content)), None, 8)


# --- FlatBuffers -----------------------------------------------------------------------------------------


class Flat:
    """A builder of FlatBuffers messages, front to back: each table is followed by what it points to."""

    def __init__(self, fields: dict[int, Any]) -> None:
        self.fields = fields

    def build(self) -> bytes:
        return struct.pack("<I", 4 + self._vtable_size()) + self._table()

    def _vtable_size(self) -> int:
        return -(-(4 + 2 * (max(self.fields, default=-1) + 1)) // 4) * 4

    def _table(self) -> bytes:
        """Return the vtable, then the table. Values of fewer than 4 bytes get 4 all the same."""
        count = max(self.fields, default=-1) + 1
        size = self._vtable_size()
        places = {field: 4 + 4 * at for at, field in enumerate(self.fields)}
        vtable = struct.pack("<HH", 4 + 2 * count, 4 + 4 * len(places))
        vtable += b"".join(struct.pack("<H", places.get(field, 0)) for field in range(count))
        head, tail = b"", b""
        end = 4 + 4 * len(places)
        for field, value in self.fields.items():
            if isinstance(value, int):
                head += struct.pack("<i", value)
                continue
            piece, inside = _piece(value)
            head += struct.pack("<I", end + len(tail) + inside - places[field])
            tail += piece
        return vtable.ljust(size, b"\0") + struct.pack("<i", size) + head + tail


def _piece(value: Any) -> tuple[bytes, int]:
    """Return the bytes of a value, and where in them it begins."""
    if isinstance(value, Flat):
        return value._table(), value._vtable_size()
    if isinstance(value, str):
        return struct.pack("<I", len(value.encode())) + value.encode(), 0
    if all(isinstance(each, int) for each in value):
        return struct.pack(f"<I{len(value)}i", len(value), *value), 0
    pieces, offsets, at = b"", b"", 0
    for each in value:
        piece, inside = _piece(each)
        offsets += struct.pack("<I", 4 * (len(value) - at) + len(pieces) + inside)
        pieces, at = pieces + piece, at + 1
    return struct.pack("<I", len(value)) + offsets + pieces, 0


def catboost(label: str = "Integer", names: Any = (0, 1), loss: str = "Logloss", texts: int = 0) -> bytes:
    floats = [Flat({1: number, 2: number}) for number in range(3)]
    trees_ = {0: 1, 4: [Flat({0: 0, 1: 3})], 5: floats} | ({12: [Flat({0: 0})]} if texts else {})
    classes = json.dumps({"class_names": list(names), "class_label_type": label}) if names else "{}"
    info = [
        Flat({0: "class_params", 1: classes}),
        Flat({0: "params", 1: json.dumps({"loss_function": {"type": loss}})}),
        Flat({0: "catboost_version_info", 1: "Branch: tags/v1.2.8\n"}),
    ]
    core = Flat({0: "FlabuffersModel_v1", 1: Flat(trees_), 2: info}).build()
    return b"CBM1" + struct.pack("<I", len(core)) + core + b"more"


def test_catboost():
    found = catboost_file.read(catboost("String", ["a", "b", "c"], "MultiClass"))
    assert found.release == "1.2.8"
    signature = trees.signature_of(found.model, None, 8)
    assert [(t.name, t.datatype, t.shape) for t in signature.inputs] == [
        ("input", "FP32", [3]), ("categories", "BYTES", [1]),
    ]  # fmt: skip
    assert [(t.name, t.datatype, t.shape) for t in signature.outputs] == [
        ("label", "BYTES", []), ("probabilities", "FP64", [3]),
    ]  # fmt: skip
    assert catboost_file.read(catboost(names=(), loss="RMSE")).model.classes == 0
    assert catboost_file.read(catboost(names=(), loss="RMSEWithUncertainty")).model.outputs == 2
    with pytest.raises(BadRequest, match=r"text features.*model\.py"):
        catboost_file.read(catboost(texts=1))


def test_many_offsets_to_one_text_have_a_budget():
    data = struct.pack("<HHHHiII", 6, 8, 4, 0, 8, 4, 5) + b"abcde"
    table = flatbuffer.Table(data, 0, len(data), 8, flatbuffer.Budget(9))
    assert table.text(0) == "abcde"
    with pytest.raises(Malformed, match="larger than the limit"):
        table.text(0)


def tflite(shape: list[int], kind: int = 0, *, named: bool = True) -> bytes:
    tensors = [Flat({1: kind, 3: "in_tensor", 7: shape}), Flat({0: [1, 3], 1: 0, 3: "out_tensor"})]
    graph = Flat({0: tensors, 1: [0], 2: [1]})
    signature = Flat({0: [Flat({0: "x", 1: 0})], 1: [Flat({0: "y", 1: 1})], 2: "serving_default"})
    return Flat({0: 3, 2: [graph]} | ({7: [signature]} if named else {})).build()


def test_tflite():
    from services.registry.domain.signature import of_graph

    found = of_graph(tflite_file.read(tflite([-1, 5])), None, 16)
    assert (found.max_batch_size, found.inputs[0].shape, found.outputs[0].shape) == (16, [5], [3])
    assert (found.inputs[0].name, found.outputs[0].name) == ("x", "y")
    fixed = of_graph(tflite_file.read(tflite([1, 5], 9, named=False)), None, 16)
    assert (fixed.max_batch_size, fixed.inputs[0].shape, fixed.inputs[0].datatype) == (0, [1, 5], "INT8")
    assert (fixed.inputs[0].name, fixed.outputs[0].name) == ("in_tensor", "out_tensor")
    with pytest.raises(BadRequest, match="of the TensorFlow Lite model has an element type"):
        of_graph(tflite_file.read(tflite([1], 8)), None, 16)


@pytest.mark.parametrize("content", [catboost(), tflite([-1, 5])])
@pytest.mark.fuzz
@given(data=st.data())
def test_changed_flatbuffers_never_break_the_reader(content, data):
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Malformed, BadRequest):
        if content[:4] == b"CBM1":
            catboost_file.read(bytes(changed))
        else:
            tflite_file.read(bytes(changed))


def test_a_message_that_is_too_short():
    with pytest.raises(Malformed, match="too early"):
        flatbuffer.root(b"\0\0", 0, 2)


# --- signatures and packages -----------------------------------------------------------------------------


def given_signature(inputs: list[tuple[str, list[int]]], output: str = "output") -> Signature:
    return Signature(
        inputs=[TensorSpec(name=name, datatype="FP32", shape=shape) for name, shape in inputs],
        outputs=[TensorSpec(name=output, datatype="FP32", shape=[])],
        max_batch_size=8,
    )


def test_a_users_signature_must_fit_the_file():
    model = TreeModel(2)
    whole, columns = given_signature([("x", [2])]), given_signature([("a", [1]), ("b", [])])
    assert trees.signature_of(model, whole, 64) == whole
    assert trees.signature_of(model, columns, 64) == columns
    for wrong in (given_signature([("x", [3])]), given_signature([("a", [1])] * 1 + [("b", [2])])):
        with pytest.raises(BadRequest, match="do not fit the model, which has 2 features"):
            trees.signature_of(model, wrong, 64)
    with pytest.raises(BadRequest, match="outputs 'score', but the model has 'output'"):
        trees.signature_of(model, given_signature([("x", [2])], "score"), 64)


def test_the_package_of_a_format_is_added_once():
    need = needs.xgboost((2, 1, 4))
    assert need.line == "xgboost-cpu==2.1.4"
    assert needs.unmet(["pandas"], [need], ()) == [need]
    assert needs.unmet(["XGBoost[plot] >= 2"], [need], ()) == []
    assert needs.unmet([], [need], ["xgboost-cpu"]) == []
    assert [each.line for each in needs.of_modules({"lightgbm", "numpy"})] == ["lightgbm==4.7.0"]
    assert needs.xgboost((1, 7, 6)).line == needs.xgboost(()).line == "xgboost-cpu==3.2.0"
    assert (needs.catboost("1.1.1").line, needs.catboost("").line) == ("catboost==1.1.1", "catboost==1.2.10")


# --- skops -----------------------------------------------------------------------------------------------

SAFE = [
    ("builtins", "dict", "DictNode"),
    ("builtins", "str", "JsonNode"),
    ("numpy", "float64", "NdArrayNode"),
    ("collections", "OrderedDict", "DictNode"),
    ("sklearn.svm._classes", "SVC", "ObjectNode"),
    ("sklearn.tree._tree", "Tree", "TreeNode"),
    ("numpy.core._multiarray_umath", "log1p", "FunctionNode"),
    ("scipy.sparse._csr", "csr_matrix", "SparseMatrixNode"),
]
UNSAFE = [
    ("os", "system", "FunctionNode"),
    ("numpy", "load", "NotANode"),
    ("numpy.lib.npyio", "load", "FunctionNode"),
    ("builtins", "eval", "FunctionNode"),
    ("builtins", "eval", "TypeNode"),
    ("sklearn.svm", "SVC", "MethodNode"),
    ("sklearn.utils", "check_array", "ObjectNode"),
    ("functools", "partial", "PartialNode"),
    ("operator", "attrgetter", "OperatorFuncNode"),
    ("mine", "Scale", "ObjectNode"),
    ("sklearnx", "A", "ObjectNode"),
    ("?", "system", "?"),
]


def test_types_of_skops_files():
    assert skops_types.untrusted(SkopsType(*each) for each in SAFE) == []
    for each in UNSAFE:
        assert skops_types.untrusted([SkopsType(*each)]) == [f"{each[0]}.{each[1]}"]
    with pytest.raises(BadRequest, match=r"mine\.Scale.*--trust mine\.Scale"):
        skops_types.check(["mine.Scale"], [])
    skops_types.check(["mine.Scale"], ["mine.Scale"])
