"""Read and write the lasting settings in ``tidegate.env`` in the state folder.

The file has one ``TIDEGATE_NAME=value`` a line. `tidegate settings set` writes the file. `tidegate up` and
every service read it. A variable in the environment has precedence over the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NAME = "tidegate.env"


def read(state: Path) -> dict[str, str]:
    """Return the settings in the file, by variable; empty if the file is unreadable or not trusted."""
    path = state / NAME
    try:
        if not path.is_file() or not is_trusted(path.stat().st_uid, os.geteuid()):
            return {}
    except OSError:
        return {}
    from dotenv import dotenv_values

    # A value is literal: `$` does not refer to another variable.
    return {name: value or "" for name, value in dotenv_values(path, interpolate=False).items()}


def is_trusted(owner: int, user: int) -> bool:
    """Return True if ``user`` may trust a file of ``owner``.

    A settings file can name the server to which the API key is sent. In a shared folder such as /tmp, another
    user could have written the file. So users trust only their own files and those of root. Root trusts all
    files, because root manages the stacks of other users.
    """
    return owner in (user, 0) or user == 0


def change(state: Path, values: Mapping[str, str | None]) -> Path:
    """Write these settings, and remove those that are None. Keep all other lines. Return the file's path."""
    from dotenv import set_key, unset_key

    path = state / NAME
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(mode=0o600)
    for name, value in values.items():
        if value is not None:
            set_key(path, name, value, quote_mode="auto")
        elif name in read(state):
            unset_key(path, name)
    path.chmod(0o600)
    return path
