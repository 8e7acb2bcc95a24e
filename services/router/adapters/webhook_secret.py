"""The master secret of all webhook secrets: ``<state>/webhook-secret``, readable by its owner only."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def load(path: Path) -> bytes:
    """Return the secret in ``path``. If there is none, write a new one of 256 bits (mode 0600)."""
    with contextlib.suppress(FileNotFoundError):
        if secret := path.read_text().strip():
            return secret.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written to another file and linked: two routers that start at once get the same, complete secret.
    new_file = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    with contextlib.suppress(FileExistsError):
        os.link(new_file, path)
    new_file.unlink()
    return path.read_text().strip().encode()
