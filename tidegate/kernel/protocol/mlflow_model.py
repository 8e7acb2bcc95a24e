"""Read the file ``MLmodel``, which describes an MLflow model, and decide how to run the model. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import yaml

from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol import archives

FILE = "MLmodel"
# The most bytes of the file. Real files are much smaller: one that describes a thousand columns has 100 KB.
MAX_FILE = 1024 * 1024
MAX_VALUES = 100_000
_MERGE = "tag:yaml.org,2002:merge"
PYFUNC, SKLEARN, XGBOOST, LIGHTGBM, ONNX, PYTORCH = (
    "python_function",
    "sklearn",
    "xgboost",
    "lightgbm",
    "onnx",
    "pytorch",
)
# The flavours that run without MLflow. Each value is the key in MLmodel that states the path of the model's
# file.
NATIVE = {ONNX: "data", XGBOOST: "data", LIGHTGBM: "data", SKLEARN: "pickled_model", PYTORCH: "model_data"}
_SAFE_SUFFIXES = {
    ONNX: (".onnx",),
    XGBOOST: (".ubj", ".json", ".xgb", ".deprecated"),
    LIGHTGBM: (".lgb", ".txt"),
    SKLEARN: (".skops",),
    PYTORCH: (),
}
# Prefixes of the types that a skops file may contain even if the publisher has not set `allow_pickle`.
_TRUSTED = ("sklearn.", "numpy.", "scipy.", "xgboost.", "lightgbm.", "collections.OrderedDict")


@dataclass(frozen=True, slots=True)
class MlflowModel:
    """The contents of ``MLmodel``. ``flavors``: the settings of each flavour, by name."""

    flavors: Mapping[str, Mapping[str, Any]]
    signature: Mapping[str, Any] | None = None
    run_id: str | None = None
    model_id: str | None = None
    created: str | None = None
    mlflow_version: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def python_version(self) -> str:
        """Return the version of Python with which the model was saved; empty if it is unknown."""
        return str(self.flavors.get(PYFUNC, {}).get("python_version") or "")


@dataclass(frozen=True, slots=True)
class Loading:
    """The plan to load an MLflow model.

    ``file``: the path of the file to load, relative to the folder of ``MLmodel``. Empty: MLflow loads the
    model. ``pickled``: True if the model's files can contain code that runs when they are loaded.
    ``function``: the method that predicts.
    """

    engine: str
    file: str
    pickled: bool
    function: str = "predict"
    kind: str = ""
    trusted: tuple[str, ...] = ()


def parsed(text: str) -> MlflowModel:
    """Return the contents of an ``MLmodel``. Raise BadRequest with a remedy if it is not valid."""
    found = yaml_of(text, FILE)
    flavors = found.get("flavors") if isinstance(found, dict) else None
    if not isinstance(flavors, dict) or not flavors:
        raise BadRequest(
            f"{FILE} names no flavours, so it is not the description of an MLflow model. Deploy the folder "
            "that MLflow wrote."
        )
    signature = found.get("signature")
    return MlflowModel(
        {str(name): value if isinstance(value, dict) else {} for name, value in flavors.items()},
        signature if isinstance(signature, dict) else None,
        _text(found.get("run_id")),
        _text(found.get("model_id")),
        _text(found.get("utc_time_created")),
        _text(found.get("mlflow_version")),
        found["metadata"] if isinstance(found.get("metadata"), dict) else {},
    )


def yaml_of(text: str, name: str) -> Any:
    """Return the contents of a YAML file.

    Raise BadRequest for bad YAML. ``name``: the file's name, for the error.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        raise BadRequest(f"{name} is not YAML: {str(problem)[:200]}. Save the model again.") from None


def home_of(files: Collection[PurePosixPath]) -> PurePosixPath | None:
    """Return the folder of ``MLmodel`` in an archive; None if ``MLmodel`` is missing."""
    return archives.home_of(files, FILE)


def loading(model: MlflowModel, files: Collection[PurePosixPath]) -> Loading:
    """Return how to load a model. Raise BadRequest if Tidegate cannot run the model.

    A model in a flavour of ``NATIVE`` runs without MLflow: the flavour's own library reads the model's file.
    All other models run with MLflow's ``python_function``.

    ``files``: the paths of the model's files, relative to the folder of ``MLmodel``.
    """
    pyfunc = model.flavors.get(PYFUNC, {})
    module = str(pyfunc.get("loader_module") or "")
    for name, key in NATIVE.items():
        settings = model.flavors.get(name)
        if settings is None or module not in ("", f"mlflow.{name}"):
            continue
        path = _file(name, settings, settings.get(key) or pyfunc.get(key), files)
        function = str(pyfunc.get("predict_fn") or "predict")
        return Loading(
            name,
            str(path),
            not path.name.endswith(_SAFE_SUFFIXES[name]) or not _trusted(settings),
            function,
            str(settings.get("model_class") or ""),
            tuple(str(each) for each in settings.get("skops_trusted_types") or ()),
        )
    if PYFUNC not in model.flavors:
        raise BadRequest(
            f"The MLflow model has only the flavours {', '.join(sorted(model.flavors))}, and no "
            f"python_function. Tidegate runs {', '.join(NATIVE)} and python_function."
        )
    own_code = module == "mlflow.pyfunc.model" and bool(pyfunc.get("model_code_path"))
    return Loading(PYFUNC, "", pickled=not own_code)


def takes_table(loading: Loading, *, named: bool) -> bool:
    """Return True if the model gets its inputs as a pandas DataFrame, and False if it gets arrays.

    ONNX and PyTorch models get arrays, because MLflow also converts tables to arrays for them. ``named``:
    True if the model's inputs are the columns of a table.
    """
    return named and loading.engine not in (ONNX, PYTORCH)


def loads_pickle(loading: Loading) -> bool:
    """Return True if scikit-learn or LightGBM loads the model's file with joblib or pickle.

    Return False for a ``.skops`` file of scikit-learn, for a Booster of LightGBM, for a ``.lgb`` or ``.txt``
    file of LightGBM, and for all other engines. A pickle file can have any suffix, so the usual suffixes of
    pickle files are not enough for this decision.
    """
    if loading.engine == LIGHTGBM:
        return loading.pickled and not loading.kind.endswith("Booster")
    return loading.engine == SKLEARN and not loading.file.endswith(".skops")


def check_pickle(loading: Loading, *, allow_pickle: bool) -> None:
    """Raise BadRequest if loading the model can run code from its files, and this is not allowed.

    ``allow_pickle``: True if the model's publisher has allowed it.
    """
    if loading.pickled and not allow_pickle:
        what = f"its {loading.engine} file {loading.file!r}" if loading.file else "its python_function"
        raise BadRequest(
            f"The MLflow model loads {what} with pickle, which runs any code in it on the workers. If you "
            "trust its origin, deploy with `tidegate deploy --allow-pickle` (in the API: allow_pickle=true). "
            "Models logged as onnx, xgboost, lightgbm (Booster), skops or from code need no such permission."
        )


def _file(
    name: str, settings: Mapping[str, Any], stated: Any, files: Collection[PurePosixPath]
) -> PurePosixPath:
    path = PurePosixPath(str(stated or ""))
    if name == PYTORCH:
        inside = [each for each in files if path in each.parents and each.stem == "model"]
        path = inside[0] if len(inside) == 1 else path / "model.pth"
    if path.is_absolute() or ".." in path.parts or path not in files:
        raise BadRequest(
            f"{FILE} says that the flavour {name} is in {str(path)[:80]!r}, and there is no such file. "
            "Download the whole model folder again."
        )
    return path


def _trusted(settings: Mapping[str, Any]) -> bool:
    """Return True if every type that a skops file needs begins with a prefix in ``_TRUSTED``.

    The code of any other type could do anything.
    """
    return all(str(each).startswith(_TRUSTED) for each in settings.get("skops_trusted_types") or ())


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that limits the number of values, so that a small file cannot fill the memory.

    It refuses merge keys, because a few of them can repeat values many times.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node. Raise YAMLError for too many nodes."""
        self._count += 1
        if self._count > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES} values")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        """Raise YAMLError for a merge key."""
        if any(key.tag == _MERGE for key, _ in node.value):
            raise yaml.YAMLError("it has a merge key, which MLflow never writes")
        super().flatten_mapping(node)
