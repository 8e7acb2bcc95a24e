"""MLflow models: how they are loaded, their signatures and their requirements."""

from __future__ import annotations

import contextlib
import json
from pathlib import PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import mlflow_model, mlflow_requirements, mlflow_signature
from tidegate.kernel.protocol.mlflow_model import Loading
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.unit

# As mlflow 3.17 writes it, without the parts that are not read.
SKLEARN = """
flavors:
  python_function:
    env: {conda: conda.yaml, virtualenv: python_env.yaml}
    loader_module: mlflow.sklearn
    model_path: model.pkl
    predict_fn: predict
    python_version: 3.11.7
  sklearn:
    code: null
    pickled_model: model.pkl
    serialization_format: cloudpickle
    sklearn_version: 1.9.1
mlflow_version: 3.17.2
model_id: m-6b1ea3d1
run_id: 4f1c
utc_time_created: '2026-11-29 21:00:00.123456'
"""
FILES = [PurePosixPath(name) for name in ("MLmodel", "model.pkl", "requirements.txt")]


def described(inputs: list[Any], outputs: list[Any]) -> mlflow_model.MlflowModel:
    text = f"signature:\n  inputs: '{json.dumps(inputs)}'\n  outputs: '{json.dumps(outputs)}'\n"
    return mlflow_model.parsed(SKLEARN + text)


def tensor(dtype: str, *shape: int, **more: Any) -> dict[str, Any]:
    return {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}, **more}


def flavour(name: str, module: str, **settings: str) -> mlflow_model.MlflowModel:
    return mlflow_model.MlflowModel({name: settings, "python_function": {"loader_module": module}})


def test_a_pickled_estimator_needs_the_permission_and_runs_without_mlflow() -> None:
    model = mlflow_model.parsed(SKLEARN)
    assert (model.run_id, model.model_id, model.python_version) == ("4f1c", "m-6b1ea3d1", "3.11.7")
    loading = mlflow_model.loading(model, FILES)
    assert loading == Loading("sklearn", "model.pkl", pickled=True)
    with pytest.raises(BadRequest, match="--allow-pickle"):
        mlflow_model.check_pickle(loading, allow_pickle=False)
    mlflow_model.check_pickle(loading, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "key", "path", "file", "pickled"),
    [
        ("xgboost", "data", "model.ubj", "model.ubj", False),
        ("lightgbm", "data", "model.lgb", "model.lgb", False),
        ("lightgbm", "data", "model.pkl", "model.pkl", True),
        ("onnx", "data", "model.onnx", "model.onnx", False),
        ("sklearn", "pickled_model", "model.skops", "model.skops", False),
        ("pytorch", "model_data", "data", "data/model.pth", True),
    ],
)
def test_how_each_flavour_is_loaded(name: str, key: str, path: str, file: str, pickled: bool) -> None:
    model = flavour(name, f"mlflow.{name}", **{key: path})
    files = [PurePosixPath(file), PurePosixPath(file).with_name("pickle_module_info.txt")]
    assert mlflow_model.loading(model, files) == Loading(name, file, pickled)


@pytest.mark.parametrize("module", ["my_loader", "mlflow.prophet"])
def test_a_loader_that_tidegate_does_not_know_runs_with_mlflow(module: str) -> None:
    model = flavour("sklearn", module, pickled_model="model.pkl")
    assert mlflow_model.loading(model, FILES) == Loading("python_function", "", pickled=True)


@pytest.mark.parametrize(
    ("loading", "expected"),
    [
        (Loading("sklearn", "model.bin", pickled=True), True),
        (Loading("sklearn", "model.skops", pickled=True), False),
        (Loading("lightgbm", "model", pickled=True, kind="lightgbm.LGBMClassifier"), True),
        (Loading("lightgbm", "model", pickled=True, kind="lightgbm.Booster"), False),
        (Loading("lightgbm", "model.txt", pickled=False), False),
        (Loading("onnx", "model.onnx", pickled=False), False),
    ],
)
def test_the_engine_and_not_the_name_says_if_a_file_is_a_pickle(loading: Loading, expected: bool) -> None:
    assert mlflow_model.loads_pickle(loading) is expected


def test_types_of_other_packages_in_a_skops_file_need_the_permission() -> None:
    settings = {"pickled_model": "m.skops", "skops_trusted_types": ["os.system"]}
    model = mlflow_model.MlflowModel({"sklearn": settings})
    assert mlflow_model.loading(model, [PurePosixPath("m.skops")]).pickled


def test_code_instead_of_a_pickle_needs_no_permission() -> None:
    text = "flavors: {python_function: {loader_module: mlflow.pyfunc.model, model_code_path: agent.py}}"
    assert not mlflow_model.loading(mlflow_model.parsed(text), [PurePosixPath("agent.py")]).pickled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("just text", "names no flavours"),
        ("flavors: {}", "names no flavours"),
        ("x: &x {a: 1}\nflavors: {<<: *x}", "merge key"),
        ("flavors: [" + "0," * 200_000 + "]", "more than 100000 values"),
        ("flavors: !!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_bad_description_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        mlflow_model.parsed(text)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "gone.onnx"])
def test_a_file_outside_the_folder_is_refused(path: str) -> None:
    model = flavour("onnx", "mlflow.onnx", data=path)
    with pytest.raises(BadRequest, match="there is no such file"):
        mlflow_model.loading(model, [PurePosixPath("model.onnx")])


def test_the_folder_of_the_model_is_the_root_or_the_only_folder() -> None:
    def home(*names: str) -> PurePosixPath | None:
        return mlflow_model.home_of([PurePosixPath(name) for name in names])

    assert home("MLmodel", "model.pkl") == PurePosixPath()
    assert home("m/MLmodel", "m/model.pkl") == PurePosixPath("m")
    assert home("a/MLmodel", "b/x") is None
    assert home("a/b/MLmodel") is None


def test_columns_are_inputs_with_one_scalar_per_row() -> None:
    model = described(
        [
            {"type": "double", "name": "age", "required": True},
            {"type": "string", "name": "city", "required": False},
            {"type": "array", "items": {"type": "double"}, "name": "history", "required": True},
        ],
        [tensor("int64", -1)],
    )
    found = mlflow_signature.signature_of(model, None, 32)
    assert [(t.name, t.datatype, t.shape, t.optional) for t in found.inputs] == [
        ("age", "FP64", [], False), ("city", "BYTES", [], True), ("history", "BYTES", [], False)
    ]  # fmt: skip
    assert [(t.name, t.datatype, t.shape) for t in found.outputs] == [("output", "INT64", [])]
    assert found.max_batch_size == 32


def test_tensors_have_a_batch_axis_if_the_first_axis_of_all_is_open() -> None:
    model = described([tensor("float32", -1, 28, 28)], [tensor("float32", -1, 10, name="scores")])
    found = mlflow_signature.signature_of(model, None, 64)
    assert [(t.name, t.shape) for t in (*found.inputs, *found.outputs)] == [
        ("input", [28, 28]),
        ("scores", [10]),
    ]
    fixed = described([tensor("float32", 1, 4)], [tensor("float32", -1)])
    found = mlflow_signature.signature_of(fixed, None, 64)
    assert (found.max_batch_size, found.inputs[0].shape, found.outputs[0].shape) == (0, [1, 4], [-1])


def test_columns_without_names_are_one_array() -> None:
    model = described([{"type": "double"}] * 3, [{"type": "double"}])
    found = mlflow_signature.signature_of(model, None, 8)
    assert [(t.name, t.shape) for t in found.inputs] == [("input", [3])]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([tensor("datetime64[ns]", -1)], "cannot be sent"),
        ([{"type": "complex", "name": "a"}], "is unknown"),
        ([tensor("float32", -1), tensor("float32", -1)], "some columns have no names"),
        ([{"type": "tensor"}], "cannot be read"),
        ([7], "cannot be read"),
    ],
)
def test_a_schema_that_cannot_be_served_says_what_to_do(inputs: list[Any], message: str) -> None:
    with pytest.raises(BadRequest, match=f"{message}.*--signature|cannot be read"):
        mlflow_signature.signature_of(described(inputs, [tensor("int64", -1)]), None, 8)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)
KNOWN = st.sampled_from(
    ["type", "name", "tensor-spec", "dtype", "shape", "required", "tensor", "long", "float32"]
)
ENTRIES = st.lists(st.dictionaries(KNOWN, KNOWN | JSON, max_size=4), max_size=3)


@pytest.mark.fuzz
@given(ENTRIES | JSON, ENTRIES | JSON)
def test_any_schema_is_read_or_refused(inputs: Any, outputs: Any) -> None:
    model = mlflow_model.MlflowModel({}, {"inputs": json.dumps(inputs), "outputs": outputs})
    with contextlib.suppress(BadRequest):
        mlflow_signature.signature_of(model, None, 8)


@pytest.mark.fuzz
@given(st.text() | JSON.map(json.dumps) | st.dictionaries(st.just("flavors"), JSON).map(json.dumps))
def test_any_description_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadRequest):
        mlflow_model.loading(mlflow_model.parsed(text), FILES)


def test_a_model_without_a_signature_says_what_to_do() -> None:
    with pytest.raises(BadRequest, match=r"does not say its inputs.*infer_signature"):
        mlflow_signature.signature_of(mlflow_model.parsed(SKLEARN), None, 8)


def test_inputs_that_only_the_user_says_are_the_columns_of_a_table() -> None:
    model = mlflow_model.parsed(SKLEARN)
    tensors = [TensorSpec(name="age", datatype="INT64"), TensorSpec(name="city", datatype="BYTES")]
    given = Signature(inputs=tensors, outputs=tensors[:1], max_batch_size=8)
    assert mlflow_signature.signature_of(model, given, 64) == given
    assert mlflow_signature.columns_of(model, given) == {"age": "any number", "city": "string"}
    assert mlflow_signature.columns_of(model, given.model_copy(update={"inputs": tensors[:1]})) is None
    named = described([{"type": "double", "name": "age"}], [tensor("int64", -1)])
    with pytest.raises(BadRequest, match=r"Use the model's names"):
        mlflow_signature.signature_of(named, given, 64)


def test_requirements_leave_out_mlflow_and_numpy_2() -> None:
    lines = ["mlflow==3.17.2", "cloudpickle==3.1.2", "numpy==2.3.5", "scikit-learn==1.9.1"]
    native = Loading("sklearn", "model.pkl", pickled=True)
    found, notes = mlflow_requirements.needed(lines, native, "3.17.2", table=True)
    assert found == ["cloudpickle==3.1.2", "scikit-learn==1.9.1", "pandas"]
    assert len(notes) == 1
    assert "numpy==2.3.5" in notes[0]
    pyfunc = Loading("python_function", "", pickled=True)
    found, _ = mlflow_requirements.needed(["mlflow==3.17.2", "pandas<3"], pyfunc, "3.17.2", table=False)
    assert found == ["pandas<3", "mlflow-skinny==3.17.2"]
    booster = Loading("xgboost", "model.ubj", pickled=False)
    assert mlflow_requirements.needed(["xgboost-cpu==3.1"], booster, "", table=False)[0] == [
        "xgboost-cpu==3.1"
    ]
    assert mlflow_requirements.needed([], booster, "", table=False)[0] == ["xgboost-cpu"]


def test_requirements_of_conda_are_those_for_pip() -> None:
    conda = "dependencies:\n- python=3.11.7\n- pip<=24\n- pip:\n  - mlflow==2.9.0\n  - xgboost==2.1.0\n"
    assert mlflow_requirements.lines_in({"conda.yaml": conda}) == "mlflow==2.9.0\nxgboost==2.1.0"
    assert mlflow_requirements.lines_in({"conda.yaml": conda, "requirements.txt": "a==1"}) == "a==1"
    with pytest.raises(BadRequest, match="not YAML"):
        mlflow_requirements.lines_in({"conda.yaml": "["})
