"""``python3 -m deploy.bootstrap [--dev]``. This file and suits.py must be readable for any Python 3."""

import sys

SUPPORTED = ((3, 11), (3, 12))


def wrong_python() -> str:
    """Why this Python cannot be used, with the remedy; empty when it can."""
    if sys.version_info[:2] in SUPPORTED:
        return ""
    return (
        f"Tidegate needs Python 3.11 or 3.12; this is {sys.version_info[0]}.{sys.version_info[1]} "
        f"({sys.executable}).\n"
        "What to do: install one of them and name it, for example\n"
        "    sudo apt-get install python3.11 python3.11-venv    # Debian 12; Ubuntu 24.04 has 3.12\n"
        "    TIDEGATE_PYTHON=/usr/bin/python3.11 make up\n"
        "Any other way to get a Python 3.11 or 3.12 (uv python install 3.12, pyenv, ...) works too;\n"
        "build that of pyenv with PYTHON_CONFIGURE_OPTS=--enable-optimizations, or it is slow."
    )


if __name__ == "__main__":
    problem = wrong_python()
    if problem:
        sys.stderr.write(problem + "\n")
        sys.exit(2)
    from deploy.bootstrap.install import main

    sys.exit(main(sys.argv[1:]))
