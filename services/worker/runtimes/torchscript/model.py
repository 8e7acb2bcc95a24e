"""A TorchScript file on torch, for a Triton without the native pytorch backend.

Inputs are passed in the order of the signature. The module returns one tensor, several (in the order of the
outputs) or a dict by output name.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from rows import Rows, parameter

# Triton's arrays are read-only views of the request; the module gets them without a copy and does not write
# to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class TritonPythonModel:
    """One instance of the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the module for inference on as many threads as the deployment gives."""
        config = json.loads(args["model_config"])
        threads = parameter(config, "INTRA_OP_THREAD_COUNT") or parameter(config, "threads") or 1
        torch.set_num_threads(int(threads))
        path = Path(args["model_repository"], args["model_version"], "model.pt")
        self._module = torch.jit.load(str(path), map_location="cpu").eval()
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        with torch.inference_mode():
            given = self._module(*(torch.from_numpy(feed[name]) for name in self._inputs if name in feed))
        if isinstance(given, torch.Tensor):
            given = (given,)
        if not isinstance(given, dict):
            if len(given) != len(self._outputs):
                raise ValueError(f"the module returned {len(given)} tensors for the outputs {self._outputs}")
            given = dict(zip(self._outputs, given, strict=True))
        return [given[name].numpy() for name in names]
