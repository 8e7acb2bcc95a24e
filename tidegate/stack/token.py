"""The service token of a stack: a file that only its owner can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tidegate import credentials


def ensure(state: Path) -> Path:
    """Write a new 256-bit token to ``<state>/token`` unless there is one; the file."""
    path = state / "token"
    credentials.write_once(path, secrets.token_urlsafe(32))
    return path


def main() -> None:
    """``python -m tidegate.stack.token``: as :func:`ensure`, for the state folder of the settings."""
    from tidegate.settings import Settings

    settings = Settings()
    # Stated otherwise: then nobody reads the file.
    if "TIDEGATE_SERVICE_TOKEN" not in os.environ or not os.environ["TIDEGATE_SERVICE_TOKEN"]:
        settings.state_path.mkdir(parents=True, exist_ok=True)
        ensure(settings.state_path)


if __name__ == "__main__":
    main()
