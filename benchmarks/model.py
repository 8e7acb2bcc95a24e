"""The digits example, trained once for the benchmarks."""

from __future__ import annotations

import subprocess

from benchmarks import places, workloads
from benchmarks.errors import BenchmarkFailed


class NoModel(BenchmarkFailed):
    """The example model cannot be made here."""


def ensure_digits() -> None:
    """Train the example unless its files are there. Raise NoModel."""
    folder = workloads.onnx_model().parent
    if workloads.onnx_model().exists() and workloads.heldout().exists():
        return
    python = places.runtime_dir() / "model-env" / "bin" / "python3"
    if not python.exists():
        raise NoModel("The models' environment is not installed: make up, or set TIDEGATE_RUNTIME_DIR.")
    script = places.ROOT / "examples" / "digits" / "train.py"
    done = subprocess.run(
        [str(python), str(script), "--out", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise NoModel(f"The example could not be trained: {done.stderr.strip()[-500:]}")
