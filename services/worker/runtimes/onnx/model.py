"""Run an ONNX file on onnxruntime, for a Triton without the native onnxruntime backend."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
from rows import Rows, parameter

DEFAULT_ROWS = 64
CUDA = "CUDAExecutionProvider"
TYPES = {
    "tensor(float)": "TYPE_FP32", "tensor(double)": "TYPE_FP64", "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16", "tensor(string)": "TYPE_STRING", "tensor(bool)": "TYPE_BOOL",
    "tensor(int8)": "TYPE_INT8", "tensor(int16)": "TYPE_INT16", "tensor(int32)": "TYPE_INT32",
    "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8", "tensor(uint16)": "TYPE_UINT16",
    "tensor(uint32)": "TYPE_UINT32", "tensor(uint64)": "TYPE_UINT64",
}  # fmt: skip


class TritonPythonModel:
    """One instance of the model. The instance group sets how many instances Triton creates."""

    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        """Add the file's inputs and outputs to a configuration that has no inputs or no outputs."""
        described = config.as_dict()
        if not (described["input"] and described["output"]):
            describe(config, Path(__file__).with_name("model.onnx"))
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Open an onnxruntime session with the file. Raise an exception if the file cannot be served."""
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        if any(config.get("optimization", {}).get("execution_accelerators", {}).values()):
            print("config.pbtxt: `execution_accelerators` has no effect: here, onnxruntime runs in Python")
        gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self._session = open_session(path, options(config), gpu)
        check_outputs(self._session)
        if config.get("sequence_batching", {}).get("state"):
            from states import StatefulRows  # only stateful models get a copy of states.py

            self.execute = StatefulRows(config, self._run).execute
        else:
            self.execute = Rows(config, self._run).execute

    def _run(self, feed: dict[str, Any], names: list[str]) -> list[Any]:
        outputs: list[Any] = self._session.run(names, feed)
        return outputs


def open_session(path: Path, settings: Any, gpu: int | None) -> Any:
    """Open the file on the GPU with the number ``gpu``, or on the CPU if ``gpu`` is None.

    Raise RuntimeError if CUDA cannot be used. Without this error, onnxruntime would silently use the CPU.
    """
    cpu = "CPUExecutionProvider"
    if gpu is None:
        return onnxruntime.InferenceSession(str(path), settings, providers=[cpu])
    if CUDA not in onnxruntime.get_available_providers():
        raise RuntimeError(no_cuda("this build is for the CPU only"))
    if hasattr(onnxruntime, "preload_dlls"):
        # Load CUDA and cuDNN from pip's packages. If there are none, onnxruntime uses the system's libraries.
        onnxruntime.preload_dlls()
    providers = [(CUDA, {"device_id": gpu}), cpu]
    with tempfile.TemporaryFile() as captured:
        with stderr_into(captured):
            session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        captured.seek(0)
        errors_text = captured.read().decode(errors="replace")
    sys.stderr.write(errors_text)
    if session.get_providers()[0] != CUDA:
        errors = re.findall(r"error: (.+)", errors_text)
        reason = f"its CUDA provider did not start ({errors[-1] if errors else errors_text.strip()[-200:]})"
        raise RuntimeError(no_cuda(reason))
    return session


@contextlib.contextmanager
def stderr_into(file: Any) -> Iterator[None]:
    """Redirect the process's stderr to a file. onnxruntime writes its errors only to stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def no_cuda(reason: str) -> str:
    """Return the error message for a replica whose GPU onnxruntime cannot use."""
    return (
        f"This replica has a GPU, but onnxruntime {onnxruntime.__version__} cannot use it: {reason}. "
        "Deploy the model with a requirements file that has the line onnxruntime-gpu[cuda,cudnn] "
        "(`--requirements FILE`), or run `make onnx-gpu` once on this host. Or allow the CPU: "
        "`--resource allow_cpu=1`."
    )


def options(config: dict[str, Any]) -> Any:
    """Return session options with the Deployment's number of threads. Idle threads sleep and do not spin."""
    found = onnxruntime.SessionOptions()
    threads = parameter(config, "intra_op_thread_count") or parameter(config, "threads") or 1
    found.intra_op_num_threads = int(threads)
    found.inter_op_num_threads = int(parameter(config, "inter_op_thread_count") or 1)
    found.log_severity_level = 3
    found.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return found


def describe(config: Any, path: Path) -> None:
    """Add the file's inputs and outputs to a configuration. Enable batching if every tensor allows it.

    A tensor allows batching if its first axis is dynamic and it has a second axis. With batching, the dims in
    the configuration leave out the first axis. Without batching, they include it.

    Raise ValueError if the configuration requires batching but a tensor forbids it.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    check_outputs(session)
    tensors = [*session.get_inputs(), *session.get_outputs()]
    batches = all(len(t.shape) > 1 and not isinstance(t.shape[0], int) for t in tensors)
    declared = config.as_dict()["max_batch_size"]
    if batches and declared == 0:
        config.set_max_batch_size(DEFAULT_ROWS)
    first = 1 if batches else 0
    if declared and not batches:
        raise ValueError(
            "max_batch_size is set, but not every input and output begins with a dynamic axis: set "
            "max_batch_size to 0, or export the model with a dynamic batch axis"
        )
    for found, add in ((session.get_inputs(), config.add_input), (session.get_outputs(), config.add_output)):
        for tensor in found:
            dims = [size if isinstance(size, int) else -1 for size in tensor.shape[first:]]
            add({"name": tensor.name, "data_type": TYPES[tensor.type], "dims": dims})


def check_outputs(session: Any) -> None:
    """Raise ValueError for an output that is not a tensor."""
    for output in session.get_outputs():
        if not output.type.startswith("tensor("):
            raise ValueError(
                f"the output {output.name!r} is a {output.type}, but only tensors can be served. "
                "If skl2onnx wrote this file, convert the model again with options={'zipmap': False}."
            )
