"""The settings of pip for a user without an account: a copy of the worker's user's own."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from services.worker.adapters.environment_files import hand_over

# Below a user's home; the second is of $XDG_CONFIG_HOME where that is set.
_LEGACY, _CURRENT = Path(".pip/pip.conf"), Path(".config/pip/pip.conf")


def make(home: Path, environment: Mapping[str, str], uid: int | None) -> dict[str, str]:
    """Fill a home with the files that pip reads, and return the environment that names them.

    With ``uid`` None pip runs as the worker's user and finds them itself. Only what is for pip is copied: a
    ``netrc`` is, with the passwords in it, where ``NETRC`` names it.
    """
    if uid is None:
        return dict(environment)
    user = Path(environment.get("HOME") or "~").expanduser()
    config = Path(environment.get("XDG_CONFIG_HOME") or user / ".config")
    _copy(user / _LEGACY, home / _LEGACY)
    _copy(config / "pip" / "pip.conf", home / _CURRENT)
    own = {key: value for key, value in environment.items() if not key.startswith("XDG_") and key != "TMPDIR"}
    own |= {"HOME": str(home), "USER": "model", "LOGNAME": "model"}
    for key, name in (("PIP_CONFIG_FILE", "pip.conf"), ("NETRC", ".netrc")):
        named = os.environ.get(key)
        # Only of this process's settings: a Deployment could name a file that is not its author's to read.
        if named and own.get(key) == named and _copy(Path(named), home / name):
            own[key] = str(home / name)
    hand_over(home, uid)
    return own


def _copy(source: Path, target: Path) -> bool:
    with contextlib.suppress(OSError):
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            return True
    return False
