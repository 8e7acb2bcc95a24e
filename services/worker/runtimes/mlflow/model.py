"""Run an MLflow model with the library of its flavour, or with MLflow's ``python_function``.

This file is copied beside the unpacked model, and the runtime for plain Python calls it. The file
``tidegate_mlflow.json`` names the library and the file that the library loads. It also says how the request's
inputs become MLflow's input: a table, a dict or an array.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow_engines import loaded


class Model:
    """One instance of the model."""

    def load(self, folder: Path, device: str, threads: int) -> None:
        """Load the model for inference."""
        self._plan = json.loads((folder / "tidegate_mlflow.json").read_text())
        home = folder / "artifact" / self._plan["home"]
        if code := self._plan["code"]:
            sys.path.insert(0, str(home / code))
        # Report no usage to MLflow's authors.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._predict = loaded(self._plan, home, device, threads)
        self._tables = importlib.import_module("pandas") if self._plan["table"] else None

    def predict(self, **inputs: Any) -> Any:
        """Return the model's outputs by name. If there is only one output, return its array."""
        return named(self._predict(self._input(inputs)), self._plan["outputs"])

    def _input(self, inputs: dict[str, Any]) -> Any:
        columns = self._plan["columns"]
        if columns is None:
            if self._plan["named"]:
                return inputs
            (array,) = inputs.values()
            return array
        found = {name: column(inputs[name], kind) for name, kind in columns.items() if name in inputs}
        return found if self._tables is None else self._tables.DataFrame(found)


def column(array: Any, kind: str) -> Any:
    """Convert an input array to a column of a table. ``kind``: the column type, as MLflow names it."""
    if kind == "datetime":
        return np.array([text.decode() for text in array.ravel()], dtype="datetime64[ns]")
    if kind == "string":
        return np.array([text.decode() for text in array.ravel()], dtype=object)
    if kind in ("array", "object", "map", "any", "sparkml_vector"):
        found = np.empty(array.size, dtype=object)
        found[:] = [json.loads(text) for text in array.ravel()]
        return found
    return array.ravel()


def named(result: Any, outputs: dict[str, bool]) -> Any:
    """Return a result of MLflow as an array, or as a dict of arrays if there are several outputs.

    ``outputs`` maps the name of each output to True if it has one scalar per row.
    """
    found = values_of(result, list(outputs))
    found = {name: plain(found[name]) for name in outputs}
    for name, scalar in outputs.items():
        if scalar and found[name].ndim == 2 and found[name].shape[1] == 1:
            found[name] = found[name][:, 0]
    return found if len(found) > 1 else next(iter(found.values()))


def values_of(result: Any, outputs: list[str]) -> dict[str, Any]:
    """Return a dict that maps each output's name to its value in ``result``.

    If ``result`` is a table or an array, the values are its columns. If it is a dict or a list, they are its
    members. If there is only one output, its value can be the whole result.
    """
    if hasattr(result, "columns"):  # a pandas DataFrame
        names = {str(name): name for name in result.columns}
        if set(outputs) <= set(names):
            return {name: result[names[name]].to_numpy() for name in outputs}
        result = result.to_numpy()
    if isinstance(result, dict):
        if set(outputs) <= set(result):
            return result
        result = only(result)
    if hasattr(result, "to_numpy"):  # a pandas Series
        result = result.to_numpy()
    if len(outputs) == 1:
        return {outputs[0]: result}
    columns = result.T if getattr(result, "ndim", 0) == 2 else result
    if len(columns) != len(outputs):
        raise ValueError(f"the model returned {len(columns)} values, but its signature has {outputs}")
    return dict(zip(outputs, columns))  # noqa: B905


def only(result: dict[str, Any]) -> Any:
    """Return the only value of a dict. Raise ValueError if the dict is empty or has several values."""
    if len(result) != 1:
        raise ValueError(f"the model returned {sorted(result)}, but its signature has other outputs")
    return next(iter(result.values()))


def plain(value: Any) -> Any:
    """Convert a value to an array of numbers, or to an array of Python objects that are texts.

    Dates become ISO texts. In an array of objects, all values that are not texts become JSON.
    """
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return array.astype(object)
    if array.dtype.kind == "M":
        return np.datetime_as_string(array).astype(object)
    if array.dtype.kind == "O":
        texts = [
            each if isinstance(each, str | bytes) else json.dumps(each, default=_plainer)
            for each in array.ravel()
        ]
        found = np.empty(len(texts), dtype=object)
        found[:] = texts
        return found.reshape(array.shape)
    return array


def _plainer(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
