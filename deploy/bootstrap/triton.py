"""Install NVIDIA's ``tritonserver`` from a wheel, and put its Python backend where Triton looks for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from deploy.bootstrap.command import Runner, environment
from deploy.bootstrap.environments import PIP_FLAGS
from deploy.bootstrap.paths import Paths, libpython, own_library_folder, python_version
from deploy.bootstrap.step import Report, StepFailed, fingerprint, stamped

BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
STUB = "triton_python_backend_stub"


def installed(paths: Paths) -> bool:
    """Return True if the locked version of Triton is installed with a backend for this Python."""
    backend = paths.triton / "backends" / "python"
    files = [backend / name for name in (*BACKEND_FILES, STUB)] + [server(paths.triton)]
    return stamped(paths.triton / ".stamp", _fingerprint(paths)) and all(f.exists() for f in files)


def install(paths: Paths, runner: Runner, report: Report) -> None:
    """Install Triton in a temporary folder, check its libraries, and move the folder into place.

    Raise StepFailed if a file or a library is missing.
    """
    log = paths.log("triton")
    fresh = paths.runtime / "triton.new"
    shutil.rmtree(fresh, ignore_errors=True)
    report("downloading, 55 MB")
    lock = paths.root / "requirements-triton.lock"
    pip = [str(paths.venv_python), "-m", "pip", "install", *PIP_FLAGS]
    runner.run([*pip, "--target", str(fresh), "-r", str(lock)], log, what="Installing Triton")
    report("placing the Python backend in its folder")
    _lay_out(fresh)
    report("checking its libraries")
    _check_libraries(fresh, log)
    (fresh / ".stamp").write_text(_fingerprint(paths))
    shutil.rmtree(paths.triton, ignore_errors=True)
    fresh.rename(paths.triton)


def server(triton: Path) -> Path:
    """Return the path of Triton's binary in an unpacked wheel."""
    return triton / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def _lay_out(triton: Path) -> None:
    """Put the Python backend and its stub program for this Python into Triton's folder of backends."""
    wheel = triton / "pytriton" / "tritonserver"
    backend = triton / "backends" / "python"
    backend.mkdir(parents=True)
    stub = wheel / "python_backend_stubs" / python_version() / STUB
    for source in (*(wheel / "backends" / "python" / name for name in BACKEND_FILES), stub):
        if not source.exists():
            raise StepFailed(
                f"The Triton package has no {source.relative_to(triton)}.",
                "Use Python 3.11 or 3.12 and the locked requirements-triton.lock.",
            )
        (backend / source.name).hardlink_to(source)
        source.chmod(0o755)
    server(triton).chmod(0o755)


def _check_libraries(triton: Path, log: Path) -> None:
    """Raise StepFailed if Triton needs a library that this machine does not have.

    Without this check, the error would appear only when the first model starts.
    """
    own = own_library_folder()
    folders = [str(triton / "nvidia_pytriton.libs"), *([str(own)] if own else [])]
    env = environment() | {"LD_LIBRARY_PATH": ":".join(folders)}
    absent = set()
    for binary in (server(triton), triton / "backends" / "python" / STUB):
        found = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False, env=env)
        with log.open("a") as output:
            output.write(f"$ ldd {binary}\n{found.stdout}{found.stderr}")
        absent |= {line.split()[0] for line in found.stdout.splitlines() if "not found" in line}
    if absent:
        raise StepFailed(
            f"Triton needs libraries that are missing: {', '.join(sorted(absent))}.", _remedy(absent), log
        )


def _remedy(absent: set[str]) -> str:
    if libpython() in absent:
        return (
            f"Install Python's shared library (Debian: sudo apt-get install libpython{python_version()}), "
            "or use an interpreter that has it: TIDEGATE_PYTHON=/usr/bin/python3 make up"
        )
    return "Install your system's packages that contain these libraries, then run the same command again."


def _fingerprint(paths: Paths) -> str:
    lock = (paths.root / "requirements-triton.lock").read_bytes()
    return fingerprint(lock, python_version(), os.uname().machine, "layout 1")
