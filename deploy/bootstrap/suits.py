"""``PYTHON -m deploy.bootstrap.suits``: whether this is a Python to make the environments from.

The exit status: 0, it is complete and fast; 10, it can be used; any other, it cannot.
This must be readable for any Python 3.
"""

import sys
import sysconfig

from deploy.bootstrap.__main__ import SUPPORTED

# Not 1: with that a Python ends which cannot even start.
GOOD, USABLE, UNFIT = 0, 10, 11


def optimized():
    # type: () -> bool
    """Whether it was compiled with what a profile told: without, as pyenv does it, loops take twice the time.

    Distributions do so for the Python in /usr, with a build of their own that leaves no word of it.
    """
    return sys.base_prefix == "/usr" or "--enable-optimizations" in (
        sysconfig.get_config_var("CONFIG_ARGS") or ""
    )


def suitability():
    # type: () -> int
    """The exit status for the Python that runs this."""
    if sys.version_info[:2] not in SUPPORTED:
        return UNFIT
    from deploy.bootstrap.system import python_lacks

    return USABLE if python_lacks() or not optimized() else GOOD


if __name__ == "__main__":
    sys.exit(suitability())
