"""A separate Tidegate for a benchmark: `tidegate up` on free ports, with its own state folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import places
from benchmarks.errors import BenchmarkFailed
from benchmarks.session import MARK
from tidegate.kernel import credentials
from tidegate.stack import processes
from tidegate.stack.ports import free_ports

PORTS = (
    "gateway_port",
    "gateway_grpc_port",
    "registry_port",
    "router_port",
    "autoscaler_port",
    "rabbitmq_port",
    "rabbitmq_dist_port",
    "epmd_port",
    "valkey_port",
    "jobs_port",
    "prometheus_port",
)
LIMIT_S = 240
EXAMPLES = places.ROOT / "examples" / "python-model"
MODELS = places.HERE / "models"


class StackFailed(BenchmarkFailed):
    """A command of the stack failed. ``str()`` is its output."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A running Tidegate. ``env``: the environment of its command line; ``root``: its checkout."""

    state: Path
    env: Mapping[str, str]
    root: Path = places.ROOT

    @property
    def url(self) -> str:
        """The gateway's URL."""
        return f"http://127.0.0.1:{self.env['TIDEGATE_GATEWAY_PORT']}"

    @property
    def gateway_port(self) -> int:
        """The gateway's REST port."""
        return int(self.env["TIDEGATE_GATEWAY_PORT"])

    def server_url(self, server: str, service: str) -> str:
        """Return the URL of a server of the stack, with the credentials of ``service``."""
        scheme, setting = {
            credentials.RABBITMQ: ("amqp", "TIDEGATE_RABBITMQ_PORT"),
            credentials.VALKEY: ("redis", "TIDEGATE_VALKEY_PORT"),
            credentials.VALKEY_JOBS: ("redis", "TIDEGATE_JOBS_PORT"),
        }[server]
        url = f"{scheme}://127.0.0.1:{self.env[setting]}/"
        return credentials.logged_in(url, self.state / "secrets", server, service)

    def command(self, *arguments: str) -> str:
        """Run ``tidegate ARGUMENTS``. Return its output. Raise StackFailed."""
        # In a separate session, so that Ctrl-C does not reach it: this process then stops the stack.
        done = subprocess.run(
            [self._python(), "-m", "tidegate.cli", *arguments],
            cwd=self.root,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            start_new_session=True,
            check=False,
        )
        if done.returncode != 0:
            said = f"{done.stdout}\n{done.stderr}".strip()[-1500:]
            raise StackFailed(f"`tidegate {arguments[0]}` exited with {done.returncode}: {said}")
        return done.stdout

    def _python(self) -> str:
        return sys.executable if self.root == places.ROOT else str(self.root / ".venv" / "bin" / "python")

    def deploy(self, path: Path, name: str, *options: str, replicas: int = 1) -> None:
        """Serve a model file with a fixed number of workers. Return when all of them are ready."""
        signature = path.with_name("signature.json")
        described = ["--signature", str(signature)] if signature.exists() else []
        count = str(replicas)
        self.command(
            "deploy", str(path), "--name", name, *described, "--min", count, "--max", count, *options
        )


@contextmanager
def tidegate(
    name: str, extra: Mapping[str, str] | None = None, *, root: Path = places.ROOT
) -> Iterator[Stack]:
    """Start a fresh stack called ``name`` in the benchmarks' folder, and stop it at the end.

    ``root``: start the stack of another checkout, with its own packages.
    Raise StackFailed if it does not start.
    """
    state = places.work_dir(name)
    stack = Stack(state, _environment(state, extra or {}), root)
    _stop(stack)
    shutil.rmtree(state, ignore_errors=True)
    try:
        stack.command("up")
        yield stack
    finally:
        _stop(stack)


def _stop(stack: Stack) -> None:
    if processes.marked(stack.state):
        stack.command("down")


def _environment(state: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """Return this environment without the user's settings, so that the defaults are measured."""
    runtime = str(places.runtime_dir())
    ours = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_") or k == MARK}
    ports = {
        f"TIDEGATE_{name.upper()}": str(port)
        for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)
    }
    places_of_its_own = {
        "TIDEGATE_STATE_DIR": str(state),
        "TIDEGATE_RUNTIME_DIR": runtime,
        "TIDEGATE_CONFIG_DIR": str(state / "config"),  # the user's contexts are not changed
        "TIDEGATE_MONITORING": "off",  # else the numbers would depend on the machine's packages
        "TIDEGATE_VERIFICATION": "off",  # else each deploy would first measure the model
    }
    return ours | ports | places_of_its_own | dict(extra)
