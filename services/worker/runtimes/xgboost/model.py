"""Run an XGBoost model.

The outputs of a classifier are ``label`` and ``probabilities``. Other models have the output ``output``,
which is the result of ``Booster.predict``. NaN is a missing value.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xgboost
from rows import Rows, numpy_type, parameter, table


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the XGBoost model."""
        config = json.loads(args["model_config"])
        self._booster = load(Path(args["model_repository"], args["model_version"], "model.xgb"))
        self._booster.set_param({"nthread": int(parameter(config, "threads") or 1)})
        learner = json.loads(self._booster.save_config())["learner"]
        self._in_place = learner["learner_train_param"]["booster"] != "gblinear"
        self._types = self._booster.feature_types
        self._rounds = rounds_of(self._booster)
        self._dtypes = {o["name"]: numpy_type(o["data_type"]) for o in config["output"]}
        self._order = [tensor["name"] for tensor in config["input"]]
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        columns = table({name: feed[name] for name in self._order}, self._booster.feature_names)
        answer = self._predict(columns)
        return [output(name, answer).astype(self._dtypes[name], copy=False) for name in names]

    def _predict(self, columns: Any) -> Any:
        if self._in_place and "c" not in (self._types or ()):
            return self._booster.inplace_predict(
                columns, missing=np.nan, validate_features=False, iteration_range=self._rounds
            )
        matrix = xgboost.DMatrix(columns, missing=np.nan, feature_types=self._types, enable_categorical=True)
        return self._booster.predict(matrix, validate_features=False, iteration_range=self._rounds)


def load(path: Path) -> Any:
    """Load a JSON or UBJSON file.

    XGBoost recognizes the format by the file's suffix. So the file is loaded through a symbolic link that has
    the right suffix.
    """
    with path.open("rb") as file:
        kind = "ubj" if file.read(2)[1:] in (b"L", b"l", b"I", b"i", b"U", b"$", b"#") else "json"
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder, f"model.{kind}")
        named.symlink_to(path.resolve())
        return xgboost.Booster(model_file=str(named))


def rounds_of(booster: Any) -> tuple[int, int]:
    """Return the range of boosting rounds to use; (0, 0) means all rounds.

    If XGBClassifier or XGBRegressor stopped the training early, only the rounds up to the best one are used.
    """
    best = booster.attr("best_iteration")
    return (0, int(best) + 1) if best is not None and booster.attr("scikit_learn") is not None else (0, 0)


def output(name: str, answer: Any) -> Any:
    """Compute the output with this name from the predictions ``answer``.

    For a binary classifier, ``answer`` is the probability of the second class in each row.
    """
    if name == "label":
        return answer > 0.5 if answer.ndim == 1 else answer.argmax(axis=1)
    if name == "probabilities" and answer.ndim == 1:
        return np.column_stack([1 - answer, answer])
    return answer
