"""Run the study of recipes in a separate process, in the models' environment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tidegate.kernel.errors import TidegateError
from tidegate.quantize.choice import Measured

SCRIPT = Path(__file__).with_name("recipes.py")
NEEDED = ("onnx", "onnxruntime", "numpy")
STOP_S = 5.0


class StudyFailed(TidegateError):
    """The study could not be made. The message says why, and what to do."""

    reason = "quantize"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a study.

    ``labels``: the name of the array with labels; None: choose it from the samples.
    ``measure``: how to compare answers; None: choose it from the answers.
    ``threads``: the number of threads of each model. ``seconds``: how long latencies are measured.
    """

    labels: str | None = None
    measure: str | None = None
    threads: int = 1
    seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class Study:
    """The measurements of all recipes, and the folder with their files.

    ``rows``: the number of rows on which the loss was measured. ``batch``: the number of rows in a call.
    ``shared``: True if the same rows were also used for calibration. ``measure``: how answers were compared.
    ``output``: the name of the model output that was compared. ``labels``: True if the samples have labels.
    """

    results: tuple[Measured, ...]
    folder: Path
    rows: int
    batch: int
    shared: bool
    measure: str
    output: str
    labels: bool

    def file(self, recipe: str) -> Path:
        """Return the path of the model that a recipe made."""
        return self.folder / f"{recipe}.onnx"

    def samples(self) -> bytes | None:
        """Return an npz file with a few rows and the original model's answers.

        Return None if the rows are too large or contain texts.
        """
        path = self.folder / "samples.npz"
        return path.read_bytes() if path.exists() else None


def python_of(runtime: Path, own: str = sys.executable) -> str:
    """Return the path of a Python that has the packages for quantisation.

    Try the Python of the models' environment first, then ``own``. Raise StudyFailed if neither has the
    packages.
    """
    for python in (str(runtime / "model-env" / "bin" / "python3"), own):
        if os.access(python, os.X_OK) and _has_packages(python):
            return python
    raise StudyFailed(
        f"Quantisation needs the packages {' and '.join(NEEDED[:2])}, and {runtime / 'model-env'} does not "
        "have them. On the stack's machine, type `make bootstrap`; elsewhere `pip install onnx onnxruntime`."
    )


def _has_packages(python: str) -> bool:
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *NEEDED], check=False, env=_environment()).returncode == 0


@contextlib.contextmanager
def studied(
    python: str, model: Path, samples: Path, options: Options, on_step: Callable[[str], None]
) -> Iterator[Study]:
    """Study a model and yield the result. After the block, delete the study's files.

    Ctrl-C ends this process and also the study's process. Raise StudyFailed if the study cannot be made.
    """
    with tempfile.TemporaryDirectory(prefix="tidegate-") as name:
        folder = Path(name)
        command = [python, str(SCRIPT), str(model), str(samples), name]
        command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
        command += ["--labels", options.labels] if options.labels else []
        command += ["--measure", options.measure] if options.measure else []
        found = _result(command, on_step)
        yield Study(
            tuple(Measured.of(row) for row in found["recipes"]),
            folder,
            **{key: found[key] for key in ("rows", "batch", "shared", "measure", "output", "labels")},
        )


def _result(command: Sequence[str], on_step: Callable[[str], None]) -> dict[str, Any]:
    """Run the command, pass its steps to ``on_step``, and return its result."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors, _process(command, errors) as process:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if "step" in said:
                    on_step(said["step"])
                elif "problem" in said:
                    raise StudyFailed(said["problem"])
                elif "result" in said:
                    result: dict[str, Any] = said["result"]
                    return result
        code = process.wait()
        errors.seek(0)
        ending = "\n".join(errors.read().strip().splitlines()[-8:])
        why = (
            "was killed, perhaps because memory ran out" if code == -signal.SIGKILL else f"exited with {code}"
        )
        raise StudyFailed(f"The process that quantises {why}.\n{ending}".rstrip())


@contextlib.contextmanager
def _process(command: Sequence[str], errors: IO[str]) -> Iterator[subprocess.Popen[str]]:
    # Start the process in a new session. So Ctrl-C in the terminal does not reach it, and the code below can
    # end it together with its children.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=_environment(),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        assert process.stdout is not None
        process.stdout.close()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
