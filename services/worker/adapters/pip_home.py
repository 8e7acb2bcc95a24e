"""Copy the worker's pip settings for the model's user, which runs pip but has no account."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from services.worker.adapters.environment_files import hand_over

# The two places of pip.conf below a user's home. If $XDG_CONFIG_HOME is set, it replaces `.config` in the
# second.
_LEGACY, _CURRENT = Path(".pip/pip.conf"), Path(".config/pip/pip.conf")


def make(home: Path, environment: Mapping[str, str], uid: int | None) -> dict[str, str]:
    """Copy pip's settings into ``home``, and return the environment with which pip finds them.

    If ``uid`` is None, pip runs as the worker's user and nothing is copied. A ``netrc`` file, which contains
    passwords, is copied only if the variable ``NETRC`` names it.
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
        # Copy a file only if the worker's own variable names it. The Deployment's author may not be allowed
        # to read a file that only the Deployment names.
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
