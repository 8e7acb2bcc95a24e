"""Files in the state folder that several routers write."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old or the new content. Create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new_file = path.with_suffix(f".{os.getpid()}")
    new_file.write_bytes(content)
    new_file.replace(path)
