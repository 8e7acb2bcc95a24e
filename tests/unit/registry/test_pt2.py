"""Programs of torch.export: their signature, and what in a file could run code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.registry.adapters import pt2_file
from services.registry.domain import pt2
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.unit

OPEN = "Symbol('s77', positive=True, integer=True)"
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
TUPLE = "builtins.tuple"


def spec(kind: str, *children: Any, context: str = "null") -> dict[str, Any]:
    return {"type": kind, "context": context, "children_spec": list(children)}


def axis(size: int | str) -> dict[str, Any]:
    return {"as_int": size} if isinstance(size, int) else {"as_expr": {"expr_str": size}}


def program(
    inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]], out: Any
) -> dict[str, Any]:
    """A description as torch 2.13 writes it, without its operations and weights."""
    tensors = inputs | outputs
    values = {name: {"dtype": 7, "sizes": [axis(size) for size in sizes]} for name, sizes in tensors.items()}
    in_spec = spec(TUPLE, spec(TUPLE, *[LEAF] * len(inputs)), spec("builtins.dict", context="[]"))
    call = {"in_spec": json.dumps([1, in_spec]), "out_spec": json.dumps([1, out])}
    call["forward_arg_names"] = [name.removeprefix("arg_") for name in inputs]  # type: ignore[assignment]
    return {
        "graph_module": {
            "graph": {"tensor_values": values},
            "signature": {
                "input_specs": [
                    {"parameter": {"arg": {"name": "p_weight"}}},
                    *({"user_input": {"arg": {"as_tensor": {"name": name}}}} for name in inputs),
                ],
                "output_specs": [{"user_output": {"arg": {"as_tensor": {"name": name}}}} for name in outputs],
            },
            "module_call_graph": [{"fqn": "", "signature": call}],
        },
        "guards_code": ["L['x'].size()[0] == L['scale'].size()[0]"],
    }


def shapes(tensors: list[TensorSpec]) -> list[tuple[str, list[int]]]:
    return [(tensor.name, tensor.shape) for tensor in tensors]


def test_the_names_are_those_of_the_function_and_the_dict() -> None:
    made = program(
        {"x": [OPEN, 8], "scale": [OPEN, 1]},
        {"mul": [OPEN, 4], "sum_1": [OPEN]},
        spec("builtins.dict", LEAF, LEAF, context='["y", "z"]'),
    )
    found = pt2.signature_of(made, None, 64)
    assert shapes(found.inputs) == [("x", [8]), ("scale", [1])]
    assert shapes(found.outputs) == [("y", [4]), ("z", [])]
    assert found.max_batch_size == 64
    assert pt2.runs_code(made, {}, {}) == ""


def test_without_one_open_first_axis_there_is_no_batch_axis() -> None:
    made = program({"x": [1, 8]}, {"y": [1, 4], "z": [OPEN]}, spec(TUPLE, LEAF, LEAF))
    found = pt2.signature_of(made, None, 64)
    assert (found.max_batch_size, shapes(found.inputs)) == (0, [("x", [1, 8])])
    assert shapes(found.outputs) == [("output_0", [1, 4]), ("output_1", [-1])]


def test_a_given_signature_must_fit() -> None:
    made = program({"x": [OPEN, 8]}, {"y": [OPEN, 4]}, LEAF)
    tensor = TensorSpec(name="mine", datatype="FP32", shape=[8])
    given = Signature(inputs=[tensor], outputs=[tensor.model_copy(update={"shape": [4]})], max_batch_size=8)
    assert pt2.signature_of(made, given, 64) == given
    wrong = given.model_copy(update={"inputs": [tensor.model_copy(update={"datatype": "INT64"})]})
    with pytest.raises(BadRequest, match="inputs do not fit"):
        pt2.signature_of(made, wrong, 64)


@pytest.mark.parametrize(
    "made", [{}, {"graph_module": 7}, program({"x": [1]}, {"y": [1]}, spec("list", spec("list")))]
)
def test_what_cannot_be_read_says_how_to_export(made: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=r"cannot be read.*torch\.export\.save"):
        pt2.signature_of(made, None, 64)


PLAIN = json.dumps({"config": {"w": {"path_name": "weight_0", "use_pickle": False}}})


@pytest.mark.parametrize(
    ("expression", "payload", "names", "why"),
    [
        ("2*s77 + Max(1, s3)", PLAIN, {"torch FloatStorage", "collections OrderedDict"}, ""),
        ("__import__('os').system('id')", PLAIN, set(), "the expression"),
        ("eval('1')", PLAIN, set(), "the expression"),
        ("Symbol('s1').__class__", PLAIN, set(), "the expression"),
        ("(lambda: 1)()", PLAIN, set(), "the expression"),
        ("L.size", PLAIN, set(), "the expression"),
        ("[" * 5000, PLAIN, set(), "the expression"),
        ("s1", PLAIN.replace("false", "true"), set(), "pickled values"),
        ("s1", PLAIN.replace("weight_0", "custom_obj_0"), set(), "pickled values"),
        ("s1", "[]", set(), "cannot be read"),
        ("s1", PLAIN, {"os system"}, "imports os system"),
        ("s1", PLAIN, {"?"}, "imports ?"),
    ],
)
def test_what_could_run_code(expression: str, payload: str, names: set[str], why: str) -> None:
    made = program({"x": [expression, 8]}, {"y": [OPEN, 4]}, LEAF)
    found = pt2.runs_code(made, {"data/weights/model_weights_config.json": payload}, {"data/s.pt": names})
    assert (why in found) if why else not found


@pytest.mark.fuzz
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "graph_module",
                        "graph",
                        "signature",
                        "input_specs",
                        "user_input",
                        "arg",
                        "in_spec",
                        "expr_str",
                    ]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=12,
    )
)
def test_any_program_is_read_or_refused(made: Any) -> None:
    found = made if isinstance(made, dict) else {"graph_module": made}
    pt2.runs_code(found, {}, {})
    with contextlib.suppress(BadRequest):
        pt2.signature_of(found, None, 8)


@pytest.mark.fuzz
@given(st.text(max_size=40))
def test_any_expression_is_judged(text: str) -> None:
    assert pt2.runs_code({"expr_str": text}, {}, {}) in ("", f"a shape has the expression {text[:80]!r}")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


EVIL, CALM = pickle.dumps(Evil(), 2), pickle.dumps(OrderedDict(), 2)


def zipped(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_the_names_in_a_pickle_of_torch() -> None:
    assert pt2_file._names_in(zipped({"a/data.pkl": CALM, "a/version": b"3"})) == {"collections OrderedDict"}
    assert pt2_file._names_in(zipped({"a/data.pkl": EVIL})) == {"posix system"}


@pytest.mark.parametrize(
    "saved",
    [
        EVIL + zipped({"a/data.pkl": CALM}),
        zipped({"a/data.pkl": CALM}) + b"x",
        zipped({"a/DATA.PKL": EVIL, "a/data.pkl": CALM}),
        zipped({"a/version": b"3", "b/data.pkl": CALM}),
    ],
)
def test_what_torch_would_read_in_another_way_names_anything(saved: bytes) -> None:
    assert pt2_file._names_in(saved) == {"?"}


def read(files: Mapping[str, bytes]) -> str:
    with zipfile.ZipFile(io.BytesIO(zipped({"m/models/model.json": b"{}", **files}))) as archive:
        return pt2_file._read(archive)[1]


def test_every_file_that_torch_finds_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = zipped({"a/data.pkl": EVIL})
    assert read({}) == ""
    assert "imports posix system" in read({"m/data/sample_inputs/MODEL.PT": evil})
    for other in ("n/data/x.pt", "m/Models/model.json"):
        with pytest.raises(ValueError, match="two folders at its root"):
            read({other: evil})
    monkeypatch.setattr(pt2_file, "MAX_PROGRAM", 100)
    assert "has more than 100 bytes" in read({"m/data/weights/x_weights_config.json": b" " * 101})
