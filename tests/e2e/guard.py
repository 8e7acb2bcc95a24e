"""Ends what a test run has started when the run itself ends otherwise than it should, by SIGKILL for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# It learns by a pipe what to run: with a stack's folder in its command line or environment it would look
# like a process of that stack. The pipe closes with this process.
CODE = """
import json, subprocess, sys
command = json.loads(sys.stdin.readline())
if not sys.stdin.read():
    subprocess.run(**command)
"""


class Guard:
    """Runs a command when this process is gone, unless :meth:`dismiss` was called before."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], cwd: Path) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", CODE], stdin=subprocess.PIPE, env=own, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdin is not None
        told = {"args": list(args), "env": dict(env), "cwd": str(cwd)}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()

    def dismiss(self) -> None:
        """End without running the command."""
        self._process.communicate("done")
