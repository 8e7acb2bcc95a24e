"""Check that Tidegate's source is here, because the wheel contains only the client and no services."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import tidegate
from tidegate.cli.exit_codes import UsageError


class NeedsSource(UsageError):
    """The error of a command that needs the services, if only the client is installed."""

    reason = "needs_source"


def root() -> Path | None:
    """Return the folder of the source; None if Tidegate was installed with `pip install tidegate`."""
    folder = Path(tidegate.__file__).parents[1]
    return folder if (folder / "services").is_dir() and (folder / "deploy").is_dir() else None


def require(command: str) -> None:
    """Raise NeedsSource if the services or their packages are not installed."""
    if root() is None:
        raise NeedsSource(
            f"`tidegate {command}` needs Tidegate's source, and this installation is only the client. "
            f"Go to a source checkout and run `make up`. "
            "To use a stack that runs elsewhere: tidegate context add NAME --url URL --key -"
        )
    if find_spec("psutil") is None:
        raise NeedsSource(
            f"`tidegate {command}` needs the packages of the services, which this Python does not have. "
            "Run `make up`, which installs them, or pip install 'tidegate[stack]'."
        )
