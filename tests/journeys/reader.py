"""Types a page's commands as a reader does: with the wheel installed, in another folder than the stack's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.e2e.conftest import REPO, Stack
from tests.journeys.pages import Command, File, Page, Skipped, comparable, matches

LONGEST_S = 600
_WRAPPER = """
set -a
[ -f {state} ] && . {state}
{command}
code=$?
{{ export -p; echo "cd $(printf %q "$PWD")"; }} > {state}
exit $code
"""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a command wrote, and how it ended."""

    output: str
    code: int


@dataclass(frozen=True)
class Reader:
    """A person with an environment, a home and a folder. ``ports`` maps usual ports to the stack's.

    ``texts`` has what stands here in place of words of the page, such as the address of a server.
    """

    environment: Path
    home: Path
    folder: Path
    ports: Mapping[int, int]
    texts: Mapping[str, str] = field(default_factory=dict)

    def follow(self, page: Page) -> None:
        """Do what a page says, step by step. Fail the test where it shows something else."""
        for step in page.steps:
            where = f"{page.path.name}:{getattr(step, 'line', '')}"
            match step:
                case File():
                    (self.folder / step.name).parent.mkdir(parents=True, exist_ok=True)
                    (self.folder / step.name).write_text(self._here(step.text))
                case Skipped():
                    print(f"{where}: not run: {step.reason}")
                case Command():
                    print(f"{where}: $ {step.text}", flush=True)
                    self._check(step, self.run(step.text), where)

    def run(self, command: str) -> Seen:
        """Run a command in a shell that remembers variables and the folder."""
        state = shlex.quote(str(self.home / ".journey"))
        done = subprocess.run(
            ["/bin/bash", "-c", _WRAPPER.format(state=state, command=self._here(command))],
            cwd=self.folder,
            env=self._variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        return Seen(self._there(done.stdout), done.returncode)

    def _check(self, step: Command, seen: Seen, where: str) -> None:
        told = f"{where}: $ {step.text}\n{seen.output}"
        if seen.code != step.exit:
            pytest.fail(f"{told}\nended with {seen.code}, the page says {step.exit}", pytrace=False)
        if step.shown.strip() and not matches(step.shown, seen.output):
            compared = f"{comparable(step.shown)}\n-- is not --\n{comparable(seen.output)}"
            pytest.fail(f"{told}\nThe page shows something else. Compared:\n{compared}", pytrace=False)

    def _variables(self) -> dict[str, str]:
        path = f"{self.environment / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.home), "NO_COLOR": "1", "COLUMNS": "200", "LC_ALL": "C.UTF-8"}

    def _here(self, text: str) -> str:
        """Return a text with the ports of this stack in place of the usual ones."""
        for usual, own in self.ports.items():
            text = re.sub(rf"\b(localhost|127\.0\.0\.1):{usual}\b", rf"\1:{own}", text)
        for written, meant in self.texts.items():
            text = text.replace(written, meant)
        return text

    def _there(self, text: str) -> str:
        for usual, own in self.ports.items():
            text = re.sub(rf"\b(localhost|127\.0\.0\.1):{own}\b", rf"\1:{usual}", text)
        for written, meant in self.texts.items():
            text = text.replace(meant, written)
        return text


def equip(environment: Path, folder: Path, stack: Mapping[str, str]) -> None:
    """Put `pip` and `make` into an environment, and the stack's own `.venv/bin/tidegate` into a folder.

    They act on this environment and on this stack. The last two are what is typed in the source's folder.
    """
    python = shlex.quote(str(environment / "bin" / "python"))
    settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in stack.items())
    clean = f"exec env {settings}"
    own = folder / ".venv" / "bin"
    own.mkdir(parents=True)
    for place, command in (
        (environment / "bin" / "pip", f"exec {sys.executable} -P -m pip --python {python}"),
        (
            environment / "bin" / "make",
            f"{clean} /usr/bin/make --no-print-directory -C {shlex.quote(str(REPO))}",
        ),
        (
            own / "tidegate",
            f"{clean} PYTHONPATH={shlex.quote(str(REPO))} {sys.executable} -P -m tidegate.cli",
        ),
    ):
        place.write_text(f'#!/bin/sh\n{command} "$@"\n')
        place.chmod(0o755)


def reader_of(
    stack: Stack, environment: Path, folder: Path, texts: Mapping[str, str] | None = None
) -> Reader:
    """Return a reader of the stack, who knows its gateway and has a key for all that the pages do."""
    key = stack.cli("keys", "create", f"reader-{os.getpid()}-{time.monotonic_ns()}", "--scope", "admin")
    settings = stack.settings
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    equip(environment, work, {k: v for k, v in stack.env.items() if k.startswith("TIDEGATE_")})
    (home / "key").write_text(key["key"])
    ports = {8000: settings.gateway_port, 8001: settings.gateway_grpc_port}
    made = Reader(environment, home, work, ports, texts or {})
    # As `make up` does for the user who types it.
    added = made.run(f"tidegate context add here --url {settings.gateway_url} --key-file ~/key --use")
    assert added.code == 0, added.output
    return made
