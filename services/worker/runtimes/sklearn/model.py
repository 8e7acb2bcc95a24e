"""Run a scikit-learn estimator from a joblib file or a skops file.

The outputs of a classifier are ``label`` and ``probabilities``. Other estimators have the output ``output``.
It comes from ``predict``, or from ``transform`` if the estimator has no ``predict``. If there are several
inputs, they become the columns of a pandas DataFrame.
"""

from __future__ import annotations

import importlib
import json
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy_2_pickles
from rows import Rows, numpy_type, parameter

numpy_2_pickles.accept()


class TritonPythonModel:
    """One instance of the estimator."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Add the estimator's input and outputs to a configuration that has no inputs.

        If the model has no signature, its configuration has no inputs.
        """
        described = config.as_dict()
        if not described["input"]:
            estimator = load(Path(__file__).with_name("model.joblib"), described)
            features = getattr(estimator, "n_features_in_", None)
            if features is None:
                raise ValueError(
                    "the estimator does not say how many features it expects: deploy it with a signature "
                    "(`tidegate deploy --signature FILE.json`)"
                )
            config.set_max_batch_size(0)
            config.add_input({"name": "input", "data_type": "TYPE_FP64", "dims": [-1, features]})
            for output in outputs_of(estimator):
                config.add_output(output)
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Load the estimator. Raise ValueError if it lacks an output that the configuration names."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.joblib")
        estimator = load(path, config)
        methods = methods_of(estimator)
        if unknown := [o["name"] for o in config["output"] if o["name"] not in methods]:
            raise ValueError(
                f"the estimator has the outputs {sorted(methods)}, but the signature names {unknown}"
            )
        self._calls = {o["name"]: (methods[o["name"]], numpy_type(o["data_type"])) for o in config["output"]}
        self._pandas = importlib.import_module("pandas") if len(config["input"]) > 1 else None
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        if self._pandas is None:
            (table,) = feed.values()
        else:
            table = self._pandas.DataFrame({name: array.reshape(len(array)) for name, array in feed.items()})
        calls = [self._calls[name] for name in names]
        return [np.asarray(method(table), dtype=datatype) for method, datatype in calls]


def load(path: Path, config: dict[str, Any]) -> Any:
    """Load the estimator.

    A skops file may use only scikit-learn's classes and the names that the Deployment trusts.
    """
    if not zipfile.is_zipfile(path):
        return joblib.load(path)
    skops = importlib.import_module("skops.io")
    given = set(json.loads(parameter(config, "tidegate_trusted") or "[]"))
    found = skops.get_untrusted_types(file=path)
    return skops.load(path, trusted=[name for name in found if name in given or is_sklearn_class(name)])


def is_sklearn_class(name: str) -> bool:
    """Return True for the name of a scikit-learn class, False for a function and for any other name."""
    return name.startswith("sklearn.") and name.rpartition(".")[2].lstrip("_")[:1].isupper()


def methods_of(estimator: Any) -> dict[str, Any]:
    """Return the names of the estimator's outputs, each with the method that computes the output."""
    if hasattr(estimator, "classes_"):
        methods = {"label": estimator.predict}
        if hasattr(estimator, "predict_proba"):
            methods["probabilities"] = estimator.predict_proba
        return methods
    if hasattr(estimator, "predict"):
        return {"output": estimator.predict}
    if hasattr(estimator, "transform"):
        return {"output": estimator.transform}
    raise ValueError(
        f"a {type(estimator).__name__} has neither predict nor transform: it is not a fitted estimator"
    )


def outputs_of(estimator: Any) -> list[dict[str, Any]]:
    """Return the estimator's outputs with their datatypes and dims. The dims include the row axis."""
    methods = methods_of(estimator)
    if "label" in methods:
        kind = np.asarray(estimator.classes_).dtype.kind
        datatype = {"i": "TYPE_INT64", "u": "TYPE_INT64", "f": "TYPE_FP64", "b": "TYPE_BOOL"}.get(
            kind, "TYPE_STRING"
        )
        outputs = [{"name": "label", "data_type": datatype, "dims": [-1]}]
        if "probabilities" in methods:
            outputs.append(
                {"name": "probabilities", "data_type": "TYPE_FP64", "dims": [-1, len(estimator.classes_)]}
            )
        return outputs
    several = not hasattr(estimator, "predict") or getattr(estimator, "n_outputs_", 1) > 1
    return [{"name": "output", "data_type": "TYPE_FP64", "dims": [-1, -1] if several else [-1]}]
