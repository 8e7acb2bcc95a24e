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
    """The folders of one installation. The interpreter ``python`` creates the environments."""

    root: Path
    venv: Path
    runtime: Path
    # The interpreter that creates environments. Inside a virtual environment, it is the base interpreter,
    # because the bootstrap may delete that environment.
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
        """Return the folder of Triton and its backends."""
        return self.runtime / "triton"

    def log(self, name: str) -> Path:
        """Return the path of a step's log."""
        return self.runtime / "log" / f"{name}.log"


def from_environment() -> Paths:
    """Return the paths from TIDEGATE_STATE_DIR and TIDEGATE_RUNTIME_DIR, or the defaults."""
    state = Path(os.environ.get("TIDEGATE_STATE_DIR") or ROOT / ".tidegate")
    runtime = Path(os.environ.get("TIDEGATE_RUNTIME_DIR") or state / "runtime")
    return Paths(ROOT, ROOT / ".venv", runtime.absolute())


def python_version() -> str:
    """Return this Python's version as in the names of packages and folders, for example ``3.11``."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def libpython() -> str:
    """Return the file name of libpython. Triton needs this library to run this Python."""
    return f"libpython{python_version()}.so.1.0"


def own_library_folder() -> Path | None:
    """Return the folder that contains this Python's libpython; None if libpython was not found."""
    folders = (sysconfig.get_config_var("LIBDIR"), str(Path(sys.executable).resolve().parent.parent / "lib"))
    return next((Path(f) for f in folders if f and (Path(f) / libpython()).exists()), None)
