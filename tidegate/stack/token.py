"""The service token and the metrics token of a stack, in files.

By default, only the owner of the files can read them.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from tidegate.kernel import credentials
from tidegate.kernel.protocol.access import metrics_token

# The metrics token has its own folder, so that a container can mount it without the service token.
METRICS_TOKEN = Path("metrics") / "token"


def ensure(state: Path) -> Path:
    """Write a new 256-bit token to ``<state>/token`` unless the file exists. Return the file's path."""
    path = state / "token"
    credentials.write_once(path, secrets.token_urlsafe(32))
    return path


def write_metrics_token(state: Path, service_token: str, mode: int = 0o600) -> Path:
    """Write the token for this stack's metrics to ``<state>/metrics/token``. Return the file's path."""
    path = state / METRICS_TOKEN
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"token.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(metrics_token(service_token) + "\n")
    fresh.chmod(mode)
    fresh.replace(path)
    return path


def main() -> None:
    """Write the tokens to the state folder: ``python -m tidegate.stack.token [--share-metrics]``.

    A new service token is written only if neither the environment nor the folder has one. With
    ``--share-metrics``, every user can read the metrics token, so that a Prometheus in a container can mount
    it as a volume.
    """
    from tidegate.kernel.settings.base import Settings

    settings = Settings()
    settings.state_path.mkdir(parents=True, exist_ok=True)
    # If the environment has a token, use it instead of the token in the file.
    stated = os.environ.get("TIDEGATE_SERVICE_TOKEN", "")
    service_token = stated or ensure(settings.state_path).read_text().strip()
    shared = "--share-metrics" in sys.argv[1:]
    path = write_metrics_token(settings.state_path, service_token, 0o644 if shared else 0o600)
    if shared:
        path.parent.chmod(0o755)


if __name__ == "__main__":
    main()
