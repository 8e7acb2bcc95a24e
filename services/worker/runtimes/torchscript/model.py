"""Run a TorchScript file, or a program of torch.export, on torch.

Triton's pytorch backend cannot run programs of torch.export. TorchScript files run here only if Triton has no
pytorch backend.

The torch module in the file gets its inputs in the order of the signature. It returns one tensor, or several
in the order of the outputs, or a dict with the names of the outputs as keys.
"""

from __future__ import annotations

import importlib
import json
import locale
import warnings
from pathlib import Path
from typing import Any

import torch
from rows import Rows, parameter

# Torch warns that Triton's arrays are read-only. Hide this warning, because it is expected: torch modules get
# the arrays without a copy, and must not write to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class TritonPythonModel:
    """One instance of the module."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the module for inference, with the Deployment's number of threads."""
        config = json.loads(args["model_config"])
        threads = parameter(config, "INTRA_OP_THREAD_COUNT") or parameter(config, "threads") or 1
        torch.set_num_threads(int(threads))
        folder = Path(args["model_repository"], args["model_version"])
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self._device = device_of(gpu)
        self._module = loaded(folder, self._device)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        with torch.inference_mode():
            # .to() and .cpu() copy only if the tensor is on another device.
            inputs = (torch.from_numpy(feed[name]).to(self._device) for name in self._inputs if name in feed)
            result = self._module(*inputs)
        if isinstance(result, torch.Tensor):
            result = (result,)
        if not isinstance(result, dict):
            if len(result) != len(self._outputs):
                raise ValueError(
                    f"the module returned {len(result)} tensors, but the model's outputs are {self._outputs}"
                )
            result = dict(zip(self._outputs, result, strict=True))
        return [result[name].cpu().numpy() for name in names]


def loaded(folder: Path, device: Any) -> Any:
    """Load the module from the version's folder onto a device."""
    exported = folder / "model.pt2"
    if not exported.exists():
        return torch.jit.load(str(folder / "model.pt"), map_location=device).eval()
    # Triton starts Python in the C locale, in which torch cannot read its own files.
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    program = torch.export.load(exported)
    if device.type != "cpu":
        program = importlib.import_module("torch.export.passes").move_to_device_pass(program, device)
    return program.module()


def device_of(gpu: int | None) -> Any:
    """Return the torch device of the GPU with number ``gpu``, or of the CPU if ``gpu`` is None.

    Raise RuntimeError if torch cannot use the GPU.
    """
    if gpu is None:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        no_device = f"torch finds no CUDA device (built for CUDA {built})"
        reason = no_device if built else "this build is for the CPU only"
        raise RuntimeError(
            f"This replica has a GPU, but torch {torch.__version__} cannot use it: {reason}. "
            "Install a build of torch whose CUDA version this host's driver supports: run `make torch`, or "
            "deploy with a requirements file that names it (`--requirements FILE`). Or allow the CPU: "
            "`--resource allow_cpu=1`."
        )
    return torch.device("cuda", gpu)
