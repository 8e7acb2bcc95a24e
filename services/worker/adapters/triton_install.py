"""Find Triton and the models' Python on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.kernel.errors import Unavailable

# Triton inherits the variables of the worker's environment that have these prefixes.
_PASSED_ON = ("CUDA_", "NVIDIA_", "NCCL_", "TZ", "LANG", "LC_", "HOME", "TMPDIR", "SSL_CERT_", "HF_HOME")


@dataclass(frozen=True)
class TritonInstall:
    """A usable Triton: from the wheel in the runtime folder, or native (installed on the system).

    ``model_bin`` is the folder of the Python that runs models; None means the system's Python. ``lower_bins``
    are the folders of further Pythons, whose packages the models' Python can also import. ``constraints``
    limit the package versions that pip may install for a model, because other versions fail in this Triton.
    ``engine_python`` is the separate Python of a language model's engine. It is None if no engine needs one.
    """

    server: Path
    backends_dir: Path
    model_bin: Path | None
    libraries: tuple[Path, ...] = ()
    lower_bins: tuple[Path, ...] = ()
    engine_python: Path | None = None
    constraints: tuple[str, ...] = ()

    @classmethod
    def find(cls, runtime: Path, server: Path | None = None, backends: Path | None = None) -> TritonInstall:
        """Return the Triton in ``runtime``, or the native ``server`` if it is given.

        Raises Unavailable, with the remedy, if a part is missing.
        """
        model_bin = runtime / "model-env" / "bin"
        has_env = (model_bin / "python3").exists()
        if server is not None:
            found = cls(server, backends or server.parent.parent / "backends", model_bin if has_env else None)
        else:
            triton = runtime / "triton"
            binary = triton / "pytriton" / "tritonserver" / "bin" / "tritonserver"
            libraries = (triton / "nvidia_pytriton.libs", *_python_libraries(model_bin / "python3"))
            if not has_env:
                raise Unavailable(
                    f"The models' Python is not at {model_bin}: run `make up`, or set TIDEGATE_RUNTIME_DIR."
                )
            backends = backends or triton / "backends"
            # With numpy 2, a model loads but each call fails.
            found = cls(binary, backends, model_bin, libraries, constraints=("numpy<2",))
        if not os.access(found.server, os.X_OK):
            raise Unavailable(
                f"There is no tritonserver at {found.server}: run `make up`, or set TIDEGATE_TRITON_SERVER."
            )
        if not found.backends():
            raise Unavailable(
                f"There are no Triton backends in {found.backends_dir}: set TIDEGATE_TRITON_BACKENDS."
            )
        return found

    def backends(self) -> frozenset[str]:
        """Return the names of the backends that this Triton can load."""
        if not self.backends_dir.is_dir():
            return frozenset()
        return frozenset(path.name for path in self.backends_dir.iterdir() if path.is_dir())

    @property
    def caches_dir(self) -> Path:
        """Return the folder of the libraries that implement this Triton's response caches."""
        return self.server.parent.parent / "caches"

    def has_cache(self) -> bool:
        """Return True if this Triton has the response cache that keeps answers in memory."""
        return (self.caches_dir / "local" / "libtritoncache_local.so").exists()

    @property
    def python(self) -> Path:
        """Return the Python that runs models."""
        return (
            self.model_bin / "python3"
            if self.model_bin
            else Path(shutil.which("python3") or "/usr/bin/python3")
        )

    def layered(self, model_bin: Path) -> TritonInstall:
        """Return this Triton with another Python, which can also import the packages of the current one."""
        return replace(self, model_bin=model_bin, lower_bins=(self.python.parent, *self.lower_bins))

    def with_engine(self, python: Path) -> TritonInstall:
        """Return this Triton, with ``python`` as the Python of a language model's engine."""
        return replace(self, engine_python=python)

    def roots(self) -> list[Path]:
        """Return the folders that Triton and the models' Python read."""
        pythons = [self.python, *(lower / "python3" for lower in self.lower_bins)]
        pythons += filter(None, [self.engine_python])
        found = [self.server.absolute().parent.parent, self.backends_dir.absolute(), *self.libraries]
        return list(dict.fromkeys([*found, *(prefix for python in pythons for prefix in prefixes(python))]))

    def has_module(self, name: str) -> bool:
        """Return True if the Python that runs models has the module ``name``."""
        pythons = [self.python, *(lower / "python3" for lower in self.lower_bins)]
        roots = {p.parent.parent for python in pythons for p in (python.absolute(), python.resolve())}
        return any(
            any(root.glob(f"{lib}/python3*/*-packages/{name}"))
            for root in roots
            for lib in ("lib", "local/lib", "lib64")
        )

    def environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a tritonserver, without Tidegate's settings and secrets.

        Variables in ``extra`` override others. But the models' Python is always first on PATH, and Triton's
        libraries are always first on LD_LIBRARY_PATH.
        """
        environment = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
        environment |= {"PYTHONUNBUFFERED": "1", "PATH": os.environ.get("PATH", os.defpath)}
        # A native Triton finds its libraries by this variable, as in NVIDIA's images.
        if not self.libraries and "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        environment |= extra
        _put_first(environment, "PATH", (self.model_bin,) if self.model_bin else ())
        _put_first(environment, "LD_LIBRARY_PATH", self.libraries)
        return environment


def prefixes(python: Path) -> list[Path]:
    """Return the root folder of a Python, and of each Python that its symbolic links lead to."""
    found, path = [], python.absolute()
    for _ in range(40):  # the kernel follows at most 40 links
        found.append(path.parent.parent)
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    return [each for each in found if each != Path("/")]


def _put_first(environment: dict[str, str], key: str, paths: tuple[Path, ...]) -> None:
    parts = [*map(str, paths), *filter(None, [environment.get(key)])]
    if parts:
        environment[key] = ":".join(parts)


def _python_libraries(python: Path) -> tuple[Path, ...]:
    """Return the folder of this Python's libpython; an empty tuple if it has none.

    Without this folder, the dynamic loader finds only the libpython of the system's Python.
    """
    lib = python.resolve().parent.parent / "lib"
    return (lib,) if any(lib.glob("libpython3*.so.*")) else ()
