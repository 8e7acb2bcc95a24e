"""The secret that all webhook secrets are derived from: ``<state>/webhook-secret``, for its owner's eyes."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def load(path: Path) -> bytes:
    """The secret in ``path``; a new one of 256 bits is written (0600) where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text().strip():
            return kept.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and linked into place: two routers that start at once agree on one, none reads half of it.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    with contextlib.suppress(FileExistsError):
        os.link(fresh, path)
    fresh.unlink()
    return path.read_text().strip().encode()
