"""The service token of a stack: a file that only its owner can read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def ensure(state: Path) -> Path:
    """Write a new 256-bit token to ``<state>/token`` unless there is one; the file."""
    path = state / "token"
    if path.is_file() and path.read_text().strip():
        return path
    # Written aside and linked into place: a reader never sees half a token, two writers agree on one.
    fresh = state / f"token.{os.getpid()}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    if path.exists():
        path.unlink()
    with contextlib.suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()
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
