"""Run commands of the container engine and of compose, with the variables for compose.yaml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.compose.images import stand_ins

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deploy" / "compose.yaml"
PROJECT = "com.docker.compose.project"
SERVICE = "com.docker.compose.service"


class ComposeFailed(Exception):
    """The error if a command fails, or if the stack cannot run or does not become healthy."""


@dataclass(frozen=True)
class Tool:
    """Runs compose and the container engine for one project.

    ``environ``: the environment variables of the commands.
    """

    command: tuple[str, ...]
    project: str
    environ: Mapping[str, str]

    def compose(self, *arguments: str, quiet: bool = False) -> None:
        """Run a compose command. Raise ComposeFailed if it fails.

        With ``quiet``, the output is not printed. If the command fails, the error contains the output's end.
        """
        command = [*self.command, "-f", str(FILE), *arguments]
        done = subprocess.run(
            command,
            env=dict(self.environ),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
        )
        if done.returncode:
            output = f":\n{done.stdout.strip()[-2000:]}" if quiet else "."
            raise ComposeFailed(f"`{' '.join(command)}` exited with {done.returncode}{output}")

    def engine(self, *arguments: str) -> str:
        """Run a command of the container engine and return its output. Raise ComposeFailed if it fails."""
        done = self._engine(*arguments)
        if done.returncode:
            raise ComposeFailed(f"`docker {' '.join(arguments)}`: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def containers(self) -> list[dict[str, Any]]:
        """Return the container engine's description of each container of the project.

        The workers that the autoscaler launched are included.
        """
        ids = self.engine("ps", "-aq", "--filter", f"label={PROJECT}={self.project}").split()
        # If a container was removed meanwhile, `inspect` fails, but still describes the other containers. So
        # the exit code is ignored.
        found: list[dict[str, Any]] = json.loads(self._engine("inspect", *ids).stdout or "[]") if ids else []
        return found

    def _engine(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["docker", *arguments],
            env=dict(self.environ),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


def missing(environ: Mapping[str, str] = os.environ) -> str:
    """Return why the stack cannot run here; empty if it can."""
    if shutil.which("docker") is None:
        return "there is no `docker` command"
    if _fails(["docker", "info"], environ):
        return "no container engine answers to `docker info`"
    if not _command(environ):
        return "there is neither `docker compose` nor `docker-compose`"
    return ""


def find(environ: Mapping[str, str] = os.environ) -> Tool:
    """Return the tool for the compose project that COMPOSE_PROJECT_NAME names (default: tidegate).

    Raise ComposeFailed if there is no container engine or no compose.
    """
    reason = missing(environ)
    if reason:
        raise ComposeFailed(f"The compose stack needs a container engine and compose: {reason}.")
    listed = subprocess.run(
        ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"],
        capture_output=True,
        text=True,
        env=dict(environ),
    )
    project = environ.get("COMPOSE_PROJECT_NAME") or "tidegate"
    chosen = stand_ins(environ, set(listed.stdout.split()))
    # If the buildx plug-in is missing, these two variables select the old builder. New engines ignore them.
    plain = {} if _has_buildx(environ) else {"DOCKER_BUILDKIT": "0", "COMPOSE_DOCKER_CLI_BUILD": "0"}
    known = {**environ, **plain, **chosen, "COMPOSE_PROJECT_NAME": project}
    return Tool(_command(environ), project, known)


def _command(environ: Mapping[str, str]) -> tuple[str, ...]:
    candidates: Sequence[tuple[str, ...]] = (("docker", "compose"), ("docker-compose",))
    if environ.get("TIDEGATE_COMPOSE"):
        candidates = (tuple(environ["TIDEGATE_COMPOSE"].split()),)
    return next((each for each in candidates if not _fails([*each, "version"], environ)), ())


def _has_buildx(environ: Mapping[str, str]) -> bool:
    return not _fails(["docker", "buildx", "version"], environ)


def _fails(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, env=dict(environ)).returncode != 0
    except OSError:
        return True
