"""Run a TensorFlow Lite file.

Inputs and outputs have the names from the file's first signature. In a file without a signature, they have
the names of its tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from rows import Rows, numpy_type, parameter


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the TFLite file."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.tflite")
        threads = int(parameter(config, "threads") or 1)
        self._interpreter = Interpreter(model_path=str(path), num_threads=threads)
        names = list(self._interpreter.get_signature_list())
        self._signature = self._interpreter.get_signature_runner(names[0]) if names else None
        self._inputs = {each["name"]: each["index"] for each in self._interpreter.get_input_details()}
        self._outputs = {each["name"]: each["index"] for each in self._interpreter.get_output_details()}
        self._dtypes = {o["name"]: numpy_type(o["data_type"]) for o in config["output"]}
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        found = self._signature(**feed) if self._signature is not None else self._by_tensors(feed)
        return [np.asarray(found[name]).astype(self._dtypes[name], copy=False) for name in names]

    def _by_tensors(self, feed: dict[str, Any]) -> dict[str, Any]:
        for name, array in feed.items():
            self._interpreter.resize_tensor_input(self._inputs[name], array.shape)
        self._interpreter.allocate_tensors()
        for name, array in feed.items():
            self._interpreter.set_tensor(self._inputs[name], array)
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index) for name, index in self._outputs.items()}
