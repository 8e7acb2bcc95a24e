"""``python -m tests.triton_examples DIR``: run NVIDIA's client examples of DIR, unmodified, against a stack.

DIR is ``src/python/examples`` of the repository of Triton's clients, which is not part of this project. The
stack is a private one. Everybody may load models there, as in Triton.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.e2e.conftest import Stack, running_stack
from tests.triton_examples.models import MODELS

LONGEST_S = 120.0


class Outcome(NamedTuple):
    """The end of an example. ``told``: its last line."""

    name: str
    passed: bool
    told: str


def main() -> int:
    """Print a row for each example. Return 0 if all passed that were run."""
    parser = argparse.ArgumentParser(prog="python -m tests.triton_examples", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder with the examples")
    parser.add_argument("--only", default="", metavar="WORD", help="only examples with this word in the name")
    given = parser.parse_args()
    examples = [each for each in sorted(given.folder.glob("*.py")) if given.only in each.name]
    if not examples:
        print(f"There is no example in {given.folder}: give src/python/examples of Triton's clients.")
        return 2
    with (
        tempfile.TemporaryDirectory() as work,
        running_stack(Path(work) / "state", model_control="infer") as stack,
    ):
        deploy_all(stack, Path(work) / "models")
        outcomes = [run(example, stack) for example in examples]
    print("| example | result | its last line |\n|---|---|---|")
    for name, passed, told in outcomes:
        print(f"| `{name}` | {'passed' if passed else 'failed'} | {told} |")
    count = sum(each.passed for each in outcomes)
    print(f"{count} of {len(outcomes)} passed")
    return 0 if count == len(outcomes) else 1


def deploy_all(stack: Stack, folder: Path) -> None:
    """Deploy the models of the examples; say which ones the stack refuses."""
    for name, model in MODELS.items():
        model.write(folder / name)
        done = stack.run("deploy", str(folder / name), "--name", name, "--min", "1", "--max", "1")
        if done.returncode:
            print(f"{name} is not deployed: {done.stderr.strip()}", flush=True)


def run(example: Path, stack: Stack) -> Outcome:
    """Run one example against the address of its protocol."""
    http = stack.settings.gateway_url.removeprefix("http://")
    url = stack.settings.gateway_grpc_target if "grpc" in example.name else http
    command = [sys.executable, str(example), "-u", url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(example.stem, False, f"it did not end within {LONGEST_S:g} s")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return Outcome(example.stem, done.returncode == 0, lines[-1][:120] if lines else "")


if __name__ == "__main__":
    sys.exit(main())
