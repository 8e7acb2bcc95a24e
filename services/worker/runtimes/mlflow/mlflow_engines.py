"""Load MLflow models in the same way as MLflow's own loaders."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Predict = Callable[[Any], Any]


def loaded(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    """Load a model with the library of its flavour. Return the function that predicts.

    The function gets MLflow's input: a table, a dict or an array. Raise RuntimeError if the replica has a GPU
    that the flavour cannot use.
    """
    if device != "cpu" and plan["engine"] in _CPU_ONLY:
        raise RuntimeError(
            f"This replica has a GPU, but models of MLflow's flavour {plan['engine']} run on the CPU. Deploy "
            "the model without `gpus` and `gpu_memory_mb`, or allow the CPU: `--resource allow_cpu=1`."
        )
    return _ENGINES[plan["engine"]](plan, home, device, threads)


def _pyfunc(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    module = importlib.import_module("mlflow.pyfunc")
    predict: Predict = module.load_model(str(home)).predict
    return predict


def _sklearn(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    import numpy_2_pickles

    numpy_2_pickles.accept()
    path = home / plan["file"]
    if path.suffix == ".skops":
        skops = importlib.import_module("skops.io")
        trusted = skops.get_untrusted_types(file=path) if plan["pickled"] else plan["trusted"]
        estimator = skops.load(path, trusted=trusted)
    else:
        # joblib also reads files of pickle and cloudpickle.
        estimator = importlib.import_module("joblib").load(path)
    predict: Predict = getattr(estimator, plan["function"])
    return predict


def _xgboost(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    import xgboost

    path, kind = home / plan["file"], plan["kind"].rpartition(".")[2] or "Booster"
    model = getattr(xgboost, kind)()
    model.load_model(path)
    if kind == "Booster":
        model.set_param({"nthread": threads})
        return lambda data: model.predict(xgboost.DMatrix(data))
    model.set_params(n_jobs=threads)
    predict: Predict = getattr(model, plan["function"])
    return predict


def _lightgbm(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    path = home / plan["file"]
    if plan["kind"].endswith("Booster") or not plan["pickled"]:
        import lightgbm

        booster = lightgbm.Booster(model_file=path)
        return lambda data: booster.predict(data, num_threads=threads)
    with path.open("rb") as file:
        model = pickle.load(file)
    predict: Predict = getattr(model, plan["function"])
    return predict


def _onnx(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    from onnx_session import open_session, options

    gpu = None if device == "cpu" else int(device.partition(":")[2])
    session = open_session(home / plan["file"], options({"parameters": _threads(threads)}), gpu)
    inputs = {each.name: each.type for each in session.get_inputs()}

    def predict(data: Any) -> Any:
        if plan["columns"] is not None and len(inputs) == 1:
            data = np.column_stack(list(data.values()))
        feed = data if isinstance(data, dict) else {next(iter(inputs)): data}
        # Convert the floats as MLflow does: its tables have 64-bit floats, but most graphs expect 32 bits.
        feed = {
            name: array.astype(np.float32)
            if inputs.get(name) == "tensor(float)" and array.dtype == np.float64
            else array
            for name, array in feed.items()
        }
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, feed)))  # noqa: B905

    return predict


def _pytorch(plan: dict[str, Any], home: Path, device: str, threads: int) -> Predict:
    import torch

    torch.set_num_threads(threads)
    path = home / plan["file"]
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
    else:
        try:
            module = torch.load(path, map_location=device, weights_only=False)
        except RuntimeError:  # this error means that the file is TorchScript
            module = torch.jit.load(str(path), map_location=device)
        module.eval()
    module.to(device)

    def predict(data: Any) -> Any:
        array = np.column_stack(list(data.values())).astype(np.float32) if plan["columns"] else data
        if isinstance(array, dict):
            (array,) = array.values()
        with torch.no_grad():
            found = module(torch.from_numpy(np.ascontiguousarray(array)).to(device))
        return found.cpu().numpy()

    return predict


def _threads(count: int) -> dict[str, Any]:
    return {"threads": {"string_value": str(count)}}


_CPU_ONLY = ("sklearn", "xgboost", "lightgbm")
_ENGINES = {
    "python_function": _pyfunc,
    "sklearn": _sklearn,
    "xgboost": _xgboost,
    "lightgbm": _lightgbm,
    "onnx": _onnx,
    "pytorch": _pytorch,
}
