"""The file ``<state>/webhook-secret``: the secret from which all webhook secrets are derived."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def load(path: Path) -> bytes:
    """Return the secret in ``path``. If the file does not exist, write a new secret (256 bits, mode 0600)."""
    with contextlib.suppress(FileNotFoundError):
        if secret := path.read_text().strip():
            return secret.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several routers may start at the same time. Each writes a secret to its own file, but only the first can
    # link its file to ``path``. Then all read ``path``.
    new_file = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(new_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    with contextlib.suppress(FileExistsError):
        os.link(new_file, path)
    new_file.unlink()
    return path.read_text().strip().encode()
