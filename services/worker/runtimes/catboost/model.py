"""Run a CatBoost model.

The outputs of a classifier are ``label`` and ``probabilities``. Other models have the output ``output``, the
result of ``predict``.

If the model has categorical columns, the input ``categories`` has their texts, and the input ``input`` has
the numbers of the other columns. Within each input, the columns are in the same order as in the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import catboost
import numpy as np
from rows import Rows, numpy_type, parameter, table


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the CatBoost model."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.cbm")
        self._dtypes = {o["name"]: numpy_type(o["data_type"]) for o in config["output"]}
        kind = catboost.CatBoostClassifier if "probabilities" in self._dtypes else catboost.CatBoostRegressor
        self._model = kind().load_model(str(path))
        self._threads = int(parameter(config, "threads") or 1)
        self._categories = self._model.get_cat_feature_indices()
        self._order = [tensor["name"] for tensor in config["input"]]
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        rows = self._rows(feed)
        if "output" in names:
            answer = self._model.predict(rows, thread_count=self._threads)
            return [np.asarray(answer).astype(self._dtypes[name], copy=False) for name in names]
        answer = self._model.predict_proba(rows, thread_count=self._threads)
        found = {"probabilities": answer, "label": np.asarray(self._model.classes_)[answer.argmax(axis=1)]}
        return [found[name].astype(self._dtypes[name], copy=False) for name in names]

    def _rows(self, feed: dict[str, Any]) -> Any:
        if not self._categories:
            return table({name: feed[name] for name in self._order}, self._model.feature_names_)
        texts = feed["categories"]
        numbers = feed.get("input", np.empty((len(texts), 0), np.float32))
        rows = np.empty((len(texts), texts.shape[1] + numbers.shape[1]), dtype=object)
        rows[:, self._categories] = texts
        rows[:, [at for at in range(rows.shape[1]) if at not in self._categories]] = numbers
        return rows
