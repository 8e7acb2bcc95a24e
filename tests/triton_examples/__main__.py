"""``python -m tests.triton_examples DIR``: run NVIDIA's client examples of DIR, unmodified, against a stack.

DIR is ``src/python/examples`` of the repository of Triton's clients, which is not part of this project. The
stack is a private one. Everybody may load models there, as in Triton.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.e2e.conftest import Stack, running_stack
from tests.triton_examples.images import ColorModel, ImageEnsemble
from tests.triton_examples.models import MODELS, Example
from tests.triton_examples.runs import COUNTED, NOT_RUN, Run, runs_of, write_files

LONGEST_S = 120.0
# The order matters: see COUNTED.
ALL_MODELS: dict[str, Example | ColorModel | ImageEnsemble] = {
    **MODELS,
    "densenet_onnx": ColorModel(),
    "preprocess_inception_ensemble": ImageEnsemble(),
}


class Outcome(NamedTuple):
    """The end of an example. ``call``: its name and arguments. ``told``: its last line."""

    call: str
    passed: bool
    told: str


def main() -> int:
    """Print a row for each call. Return 0 if all passed that were run."""
    parser = argparse.ArgumentParser(prog="python -m tests.triton_examples", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder with the examples")
    parser.add_argument("--only", default="", metavar="WORD", help="only examples with this word in the name")
    given = parser.parse_args()
    examples = [each for each in sorted(given.folder.glob("*.py")) if given.only in each.stem]
    if not examples:
        print(f"There is no example in {given.folder}: give src/python/examples of Triton's clients.")
        return 2
    with (
        tempfile.TemporaryDirectory() as work,
        running_stack(Path(work) / "state", model_control="infer") as stack,
    ):
        print("| example | result | its last line |\n|---|---|---|")
        outcomes = list(Examples(stack, Path(work), examples).run_all())
    count = sum(each.passed for each in outcomes)
    print(f"{count} of {len(outcomes)} passed")
    return 0 if count == len(outcomes) else 1


class Examples:
    """The examples of a folder, and the stack that they call."""

    def __init__(self, stack: Stack, work: Path, examples: list[Path]) -> None:
        self._stack, self._work, self._examples = stack, work, examples
        self._files = write_files(work)

    def run_all(self) -> Iterator[Outcome]:
        """Deploy the models and run every example, at the moment when its number of models is deployed."""
        for count, (name, model) in enumerate(ALL_MODELS.items(), 1):
            self._deploy(name, model)
            counted = [each for each in self._examples if COUNTED.get(each.stem) == count]
            yield from self._run(counted)
            if counted:
                self._stack.run("resume", "simple")  # those examples unload it
        yield from self._run([each for each in self._examples if each.stem not in COUNTED])

    def _deploy(self, name: str, model: Example | ColorModel | ImageEnsemble) -> None:
        folder = self._work / "models" / name
        model.write(folder)
        done = self._stack.run("deploy", str(folder), "--name", name, "--min", "1", "--max", "1")
        if done.returncode:
            print(f"{name} is not deployed: {done.stderr.strip()}", flush=True)

    def _run(self, examples: list[Path]) -> Iterator[Outcome]:
        for example in examples:
            if example.stem in NOT_RUN:
                print(f"| `{example.stem}` | not run | {NOT_RUN[example.stem]} |", flush=True)
                continue
            for each in runs_of(example.stem):
                outcome = self._outcome(example, each)
                result = "passed" if outcome.passed else "failed"
                print(f"| `{outcome.call}` | {result} | {outcome.told} |", flush=True)
                yield outcome

    def _outcome(self, example: Path, run: Run) -> Outcome:
        """Run one example against the address of its protocol."""
        settings = self._stack.settings
        call = f"{example.stem} {run.arguments}".strip()
        http = settings.gateway_url.removeprefix("http://")
        command = [
            sys.executable,
            str(example),
            "-u",
            settings.gateway_grpc_target if "grpc" in call or "vllm" in call else http,
        ]
        command += run.filled(self._files)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
        except subprocess.TimeoutExpired:
            return Outcome(call, False, f"it did not end within {LONGEST_S:g} s")
        output = done.stdout + done.stderr
        lines = [line for line in output.splitlines() if line.strip()]
        passed = done.returncode == 0 and run.says in output
        return Outcome(call, passed, lines[-1][:120] if lines else "")


if __name__ == "__main__":
    sys.exit(main())
