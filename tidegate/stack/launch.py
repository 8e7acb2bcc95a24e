"""Start one child: create its folders and files, open its log, start its process."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tidegate.stack.child import Child

TAIL_LINES = 15


def spawn(
    child: Child, log: Path, variables: Mapping[str, str] = MappingProxyType({}), pass_fds: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start the child in its own session, so that Ctrl-C in the terminal does not end it.

    ``variables``: more variables for its environment. ``pass_fds``: file descriptors that it inherits.
    """
    for folder in (*child.folders, log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for path, text in child.files.items():
        path.write_text(text)
    for place, target in child.links.items():
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)  # in a copy of a state folder, the link can be a real folder
        place.unlink(missing_ok=True)
        place.symlink_to(target)
    with log.open("ab") as output:
        return subprocess.Popen(
            child.argv,
            env=dict(child.env) | dict(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )


def tail(log: Path, *, start: int = 0, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log. Leave out the first ``start`` bytes of the log."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start if start <= size else 0, size - 64_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def size(log: Path) -> int:
    """Return the size of a log in bytes; 0 if it does not exist."""
    try:
        return log.stat().st_size
    except OSError:
        return 0
