"""Run a LightGBM model.

The outputs of a classifier are ``label`` and ``probabilities``. Other models have the output ``output``,
which is the result of ``Booster.predict``. NaN is a missing value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from rows import Rows, numpy_type, parameter, table


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the LightGBM model."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.txt")
        self._booster = lightgbm.Booster(model_file=str(path))
        self._threads = int(parameter(config, "threads") or 1)
        self._dtypes = {o["name"]: numpy_type(o["data_type"]) for o in config["output"]}
        self._order = [tensor["name"] for tensor in config["input"]]
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        columns = table({name: feed[name] for name in self._order}, self._booster.feature_name())
        answer = self._booster.predict(columns, num_threads=self._threads)
        return [output(name, answer).astype(self._dtypes[name], copy=False) for name in names]


def output(name: str, answer: Any) -> Any:
    """Return the output ``name``.

    ``answer``: the predictions. For a binary classifier, they are the probabilities of class 1.
    """
    if name == "label":
        return answer > 0.5 if answer.ndim == 1 else answer.argmax(axis=1)
    if name == "probabilities" and answer.ndim == 1:
        return np.column_stack([1 - answer, answer])
    return answer
