"""Where the bootstrap puts things, and which Python it does it with."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Paths:
    """The folders of one installation. ``python`` is the interpreter that the environments are made from."""

    root: Path
    venv: Path
    runtime: Path
    # Of an environment the interpreter below it: the environment itself may have to be made anew.
    python: Path = Path(getattr(sys, "_base_executable", sys.executable))

    @property
    def venv_python(self) -> Path:
        """The interpreter of the services."""
        return self.venv / "bin" / "python"

    @property
    def model_env(self) -> Path:
        """The environment in which Triton runs Python models."""
        return self.runtime / "model-env"

    @property
    def triton(self) -> Path:
        """The unpacked Triton and its backends."""
        return self.runtime / "triton"

    def log(self, name: str) -> Path:
        """The log of one step."""
        return self.runtime / "log" / f"{name}.log"


def from_environment() -> Paths:
    """The places that TIDEGATE_STATE_DIR and TIDEGATE_RUNTIME_DIR ask for."""
    state = Path(os.environ.get("TIDEGATE_STATE_DIR") or ROOT / ".tidegate")
    runtime = Path(os.environ.get("TIDEGATE_RUNTIME_DIR") or state / "runtime")
    return Paths(ROOT, ROOT / ".venv", runtime.absolute())


def python_version() -> str:
    """As in names of packages and folders: ``3.11``."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def libpython() -> str:
    """The shared library that Triton's stub for this Python loads."""
    return f"libpython{python_version()}.so.1.0"


def own_library_folder() -> Path | None:
    """The folder of this interpreter's own libpython, if it was built as a shared library."""
    folders = (sysconfig.get_config_var("LIBDIR"), str(Path(sys.executable).resolve().parent.parent / "lib"))
    return next((Path(f) for f in folders if f and (Path(f) / libpython()).exists()), None)
