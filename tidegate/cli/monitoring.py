"""``up --with-monitoring``: install Prometheus if it is missing, and make it a part of the stack."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from tidegate.cli import source_checkout
from tidegate.cli.own_stack import StackFailed

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings
    from tidegate.stack.record import StackRecord

NAME = "prometheus"


def enabled(found: Settings, record: StackRecord) -> Settings:
    """Install Prometheus if it is missing. Return the settings to start the stack with Prometheus.

    Raise StackFailed if Prometheus cannot be installed, or if the stack already runs without it.
    """
    if record.supervisor is not None:
        if url(record) is None:
            raise StackFailed(
                "The stack runs without Prometheus. To add it, type `tidegate down` and then "
                "`tidegate up --with-monitoring`."
            )
        return found
    _install()
    return found.model_copy(update={"monitoring": "on"})


def _install() -> None:
    # The installer's progress goes to stderr. So with `--json`, stdout contains only one JSON document.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "deploy.bootstrap.monitoring"],
        cwd=source_checkout.root(),
        env={**os.environ, "PYTHONPATH": str(source_checkout.root())},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode:
        raise StackFailed("Prometheus could not be installed; the lines above say why and what to do.")


def url(record: StackRecord) -> str | None:
    """Return the address of the stack's Prometheus; None if the stack has none."""
    port = next((child.ports[0] for child in record.children if child.name == NAME), None)
    return f"http://127.0.0.1:{port}" if port else None
