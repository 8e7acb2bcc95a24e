"""Give pip the settings of the worker's user when it runs as a user without an account."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from services.worker.adapters.environment_files import hand_over

# Below a user's home. If $XDG_CONFIG_HOME is set, the second is there.
_LEGACY, _CURRENT = Path(".pip/pip.conf"), Path(".config/pip/pip.conf")


def make(home: Path, environment: Mapping[str, str], uid: int | None) -> dict[str, str]:
    """Copy the files that pip reads into a home, and return the environment that names them.

    If ``uid`` is None, pip runs as the worker's user and finds its files itself. Only files meant for pip are
    copied. A ``netrc``, with its passwords, is copied if ``NETRC`` names it.
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
        # Only files that this process's environment names: a Deployment could name a file that its author
        # must not read.
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
