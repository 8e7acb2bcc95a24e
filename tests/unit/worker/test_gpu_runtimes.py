"""Tidegate's runtimes on a GPU, with fake libraries, because the tests' machines have no GPU.

`make test-gpu` runs the real libraries on a real GPU, `tests/integration/worker/test_devices.py` without one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.unit

RUNTIMES = Path(__file__).parents[3] / "services" / "worker" / "runtimes"
CONFIG = {"input": [{"name": "x"}], "output": [{"name": "y"}], "max_batch_size": 0, "parameters": {}}


def loaded(runtime: str, library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the runtime's module, which imports ``library`` in place of the real one."""
    rows = ModuleType("rows")
    rows.Rows = lambda config, call: SimpleNamespace(execute=call)  # type: ignore[attr-defined]
    rows.parameter = lambda config, key: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rows", rows)
    monkeypatch.setitem(sys.modules, library.__name__, library)
    spec = importlib.util.spec_from_file_location(f"{runtime}_runtime", RUNTIMES / runtime / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(kind: str, device: str, config: dict[str, Any] = CONFIG) -> dict[str, str]:
    """Return the arguments that Triton passes to an instance at its start."""
    return {
        "model_config": json.dumps(config), "model_repository": "/models/m", "model_version": "1",
        "model_instance_kind": kind, "model_instance_device_id": device,
    }  # fmt: skip


def onnx_library(available: list[str], *, starts: bool = True) -> Any:
    """Return a fake onnxruntime. If its CUDA provider does not start, it writes the reason to stderr."""

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            library.asked = providers
            names = [each if isinstance(each, str) else each[0] for each in providers]
            if not starts and "CUDAExecutionProvider" in names:
                os.write(2, b"[E] Failed with error: libcublasLt.so.13: cannot open it\n[W] more\n")
                names.remove("CUDAExecutionProvider")
            self.get_providers = lambda: names
            self.get_outputs = list

    library: Any = ModuleType("onnxruntime")
    library.__version__ = "1.31.1"
    library.InferenceSession = Session
    library.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=lambda key, value: None)
    library.get_available_providers = lambda: available
    return library


def test_onnx_asks_for_cuda_on_the_device_that_triton_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to request only the CPU's provider."""
    library = onnx_library(["CUDAExecutionProvider", "CPUExecutionProvider"])
    runtime = loaded("onnx", library, monkeypatch)
    runtime.TritonPythonModel().initialize(arguments("GPU", "1"))
    assert library.asked == [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]
    runtime.TritonPythonModel().initialize(arguments("CPU", "0"))
    assert library.asked == ["CPUExecutionProvider"]


def test_onnx_on_the_cpu_in_silence_is_refused_with_the_librarys_reason(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real library goes on with the CPU and only logs the reason."""
    library = onnx_library(["CUDAExecutionProvider", "CPUExecutionProvider"], starts=False)
    runtime = loaded("onnx", library, monkeypatch)
    with pytest.raises(RuntimeError, match=r"did not start \(libcublasLt.so.13: cannot open it\).*onnx-gpu"):
        runtime.TritonPythonModel().initialize(arguments("GPU", "0"))
    assert "[W] more" in capfd.readouterr().err, "Triton's log still has all of it"


def test_onnx_of_a_build_for_the_cpu_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = loaded("onnx", onnx_library(["CPUExecutionProvider"]), monkeypatch)
    with pytest.raises(RuntimeError, match=r"this build is for the CPU only.*onnxruntime-gpu\[cuda,cudnn\]"):
        runtime.TritonPythonModel().initialize(arguments("GPU", "0"))


class Tensor:
    """A fake tensor with a device."""

    def __init__(self, array: Any, device: str = "cpu") -> None:
        self.array, self.device = array, device

    def to(self, device: str) -> Tensor:
        return Tensor(self.array, device)

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def numpy(self) -> Any:
        assert self.device == "cpu", "numpy reads no memory of a GPU"
        return self.array


def torch_library(*, cuda: bool, built: str | None = "13.0") -> Any:
    """Return a fake torch whose module doubles tensors of its own device."""
    library: Any = ModuleType("torch")

    def load(path: str, map_location: str) -> Any:
        library.loaded_on = map_location

        def module(x: Tensor) -> Tensor:
            assert x.device == map_location, "the module's weights are elsewhere"
            return Tensor(x.array * 2, x.device)

        return SimpleNamespace(eval=lambda: module)

    library.__version__ = "2.13.0"
    library.Tensor = Tensor
    library.from_numpy = Tensor
    library.device = lambda kind, number=None: kind if number is None else f"{kind}:{number}"
    library.cuda = SimpleNamespace(is_available=lambda: cuda)
    library.version = SimpleNamespace(cuda=built)
    library.jit = SimpleNamespace(load=load)
    library.set_num_threads = lambda count: None
    library.inference_mode = lambda: Guard()
    return library


class Guard:
    """A context manager that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize(("kind", "number", "device"), [("GPU", "1", "cuda:1"), ("CPU", "0", "cpu")])
def test_torchscript_runs_where_triton_says(
    monkeypatch: pytest.MonkeyPatch, kind: str, number: str, device: str
) -> None:
    """Weights, inputs and outputs must each be moved; all used to be on the CPU."""
    library = torch_library(cuda=True)
    model = loaded("torchscript", library, monkeypatch).TritonPythonModel()
    model.initialize(arguments(kind, number))
    assert library.loaded_on == device
    (y,) = model.execute({"x": np.arange(3.0)}, ["y"])
    assert y.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("built", "reason"),
    [(None, "this build is for the CPU only"), ("13.0", r"finds no CUDA device \(built for CUDA 13.0")],
)
def test_torch_that_cannot_use_the_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, built: str | None, reason: str
) -> None:
    runtime = loaded("torchscript", torch_library(cuda=False, built=built), monkeypatch)
    with pytest.raises(RuntimeError, match=f"{reason}.*make torch.*allow_cpu=1"):
        runtime.TritonPythonModel().initialize(arguments("GPU", "0"))
