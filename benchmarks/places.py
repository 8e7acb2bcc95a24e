"""The folders of the benchmarks' environments, servers' data and results."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
PEERS = HERE / "peers"
PLOT = "plot"


def bench_dir() -> Path:
    """Return the folder for everything that benchmarks write: ``TIDEGATE_BENCH_DIR``, else ``bench``."""
    chosen = os.environ.get("TIDEGATE_BENCH_DIR")
    return Path(chosen).absolute() if chosen else state_dir() / "bench"


def state_dir() -> Path:
    """Return the state folder of the checkout, where ``make up`` installs."""
    return Path(os.environ.get("TIDEGATE_STATE_DIR") or ROOT / ".tidegate").absolute()


def runtime_dir() -> Path:
    """Return the folder of Triton and of the models' environment, as `make up` installed them."""
    return Path(os.environ.get("TIDEGATE_RUNTIME_DIR") or state_dir() / "runtime").absolute()


def environment(name: str) -> Path:
    """Return the virtual environment of a peer, or of the charts (``plot``)."""
    return bench_dir() / "env" / name


def python(name: str) -> Path:
    """Return the interpreter of that environment."""
    return environment(name) / "bin" / "python"


def lock(name: str) -> Path:
    """Return the hash-locked requirements of that environment."""
    return (HERE if name == PLOT else PEERS / name) / "requirements.lock"


def work_dir(name: str) -> Path:
    """Return the folder for a server's data and logs while it runs."""
    return bench_dir() / "work" / name


def results_dir() -> Path:
    """Return the folder for results, unless ``--out`` names another one."""
    return bench_dir() / "results"
