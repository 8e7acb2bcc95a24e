"""Run the signature ``serving_default`` of a TensorFlow SavedModel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow
from rows import Rows, numpy_type, parameter


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the SavedModel."""
        config = json.loads(args["model_config"])
        threads = int(parameter(config, "threads") or 1)
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        folder = Path(args["model_repository"], args["model_version"], "saved_model")
        (file,) = [*folder.glob("saved_model.pb"), *folder.glob("*/saved_model.pb")][:1]
        # Keep a reference to the loaded object, because its function fails once the object is deleted.
        self._loaded = tensorflow.saved_model.load(str(file.parent))
        self._function = self._loaded.signatures["serving_default"]
        self._specs = self._function.structured_input_signature[1]
        self._dtypes = {o["name"]: numpy_type(o["data_type"]) for o in config["output"]}
        self.execute = Rows(config, self._run, decode=False).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        inputs = {
            name: tensorflow.constant(array, dtype=self._specs[name].dtype) for name, array in feed.items()
        }
        found = self._function(**inputs)
        return [np.asarray(found[name].numpy()).astype(self._dtypes[name], copy=False) for name in names]
