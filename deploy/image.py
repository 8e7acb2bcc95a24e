"""``python -m deploy.image services|triton|models``: install parts of an image from the lock files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from deploy.bootstrap import install, progress
from deploy.bootstrap.command import Runner, tail
from deploy.bootstrap.paths import from_environment
from deploy.bootstrap.step import StepFailed

PARTS = {
    "services": ("venv", "services"),
    "triton": ("triton",),
    "models": ("model-env",),
}
"""The bootstrap's steps for each part. The base image replaces the steps of system packages."""


def main(argv: Sequence[str]) -> int:
    """Install the named parts. Return the exit code."""
    if not argv or set(argv) - PARTS.keys():
        print(f"usage: python -m deploy.image {'|'.join(PARTS)} ...", file=sys.stderr)
        return 2
    names = {name for part in argv for name in PARTS[part]}
    runner = Runner()
    wanted = [step for step in install.steps(from_environment(), runner, dev=False) if step.name in names]
    show = progress.for_output({step.name: step.title for step in wanted})
    try:
        install.run(wanted, runner, show)
    except StepFailed as failure:
        output = tail(failure.log, 30) if failure.log else ""
        print(f"{failure.what}\n{output}\n{failure.remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
