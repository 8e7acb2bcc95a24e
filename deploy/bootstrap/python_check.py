"""``PYTHON -m deploy.bootstrap.python_check``: check if this Python can create the environments.

Exit status 0: this Python is complete and fast. 10: it can be used, but it is slow or needs a package. Any
other status: it cannot be used. This file must parse in every Python 3, so that it can report the version.
"""

import sys
import sysconfig

SUPPORTED = ((3, 11), (3, 12))

# UNFIT is not 1, because 1 is the exit status of a Python that cannot start.
GOOD, USABLE, UNFIT = 0, 10, 11


def wrong_version():
    # type: () -> str
    """Return why this version of Python cannot be used, and what to do; empty if it can be used."""
    if sys.version_info[:2] in SUPPORTED:
        return ""
    return (
        f"Tidegate needs Python 3.11 or 3.12; this is {sys.version_info[0]}.{sys.version_info[1]} "
        f"({sys.executable}).\n"
        "What to do: install one of these versions and set TIDEGATE_PYTHON to it, for example\n"
        "    sudo apt-get install python3.11 python3.11-venv    # Debian 12; Ubuntu 24.04 has 3.12\n"
        "    TIDEGATE_PYTHON=/usr/bin/python3.11 make up\n"
        "Any other Python 3.11 or 3.12 (uv python install 3.12, pyenv, ...) works too. In pyenv, build it\n"
        "with PYTHON_CONFIGURE_OPTS=--enable-optimizations. Without this option, Tidegate is slower."
    )


def optimized():
    # type: () -> bool
    """Return True if this Python was compiled with profile-guided optimization.

    In a Python without this optimization, loops take twice as long. pyenv compiles without it by default.
    Linux distributions compile with it, but their Python does not report it. So the result is True for every
    Python in /usr.
    """
    return sys.base_prefix == "/usr" or "--enable-optimizations" in (
        sysconfig.get_config_var("CONFIG_ARGS") or ""
    )


def suitability():
    # type: () -> int
    """Return the exit status for this Python: GOOD, USABLE or UNFIT."""
    if sys.version_info[:2] not in SUPPORTED:
        return UNFIT
    from deploy.bootstrap.system import python_lacks

    return USABLE if python_lacks() or not optimized() else GOOD


if __name__ == "__main__":
    sys.exit(suitability())
