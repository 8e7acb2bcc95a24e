"""The folders that the bootstrap writes to, and the Python that it uses."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Paths:
    """The folders of one installation. The environments are made from the interpreter ``python``."""

    root: Path
    venv: Path
    runtime: Path
    # In an environment, this is the base interpreter: the environment itself may have to be made again.
    python: Path = Path(getattr(sys, "_base_executable", sys.executable))

    @property
    def venv_python(self) -> Path:
        """Return the interpreter of the services."""
        return self.venv / "bin" / "python"

    @property
    def model_env(self) -> Path:
        """Return the environment in which Triton runs Python models."""
        return self.runtime / "model-env"

    @property
    def triton(self) -> Path:
        """Return the folder of the unpacked Triton and its backends."""
        return self.runtime / "triton"

    def log(self, name: str) -> Path:
        """Return the log of a step."""
        return self.runtime / "log" / f"{name}.log"


def from_environment() -> Paths:
    """Return the paths that TIDEGATE_STATE_DIR and TIDEGATE_RUNTIME_DIR choose."""
    state = Path(os.environ.get("TIDEGATE_STATE_DIR") or ROOT / ".tidegate")
    runtime = Path(os.environ.get("TIDEGATE_RUNTIME_DIR") or state / "runtime")
    return Paths(ROOT, ROOT / ".venv", runtime.absolute())


def python_version() -> str:
    """Return the version as in names of packages and folders: ``3.11``."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def libpython() -> str:
    """Return the file name of libpython, the library that Triton needs to run this Python."""
    return f"libpython{python_version()}.so.1.0"


def own_library_folder() -> Path | None:
    """Return the folder of this Python's libpython; None if it was built without a shared library."""
    folders = (sysconfig.get_config_var("LIBDIR"), str(Path(sys.executable).resolve().parent.parent / "lib"))
    return next((Path(f) for f in folders if f and (Path(f) / libpython()).exists()), None)
