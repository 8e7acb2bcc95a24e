"""What things may be called."""

from __future__ import annotations

import re

from tidegate.errors import BadRequest
from tidegate.protocol.models import NAME_PATTERN

_NAME = re.compile(NAME_PATTERN)


def check(kind: str, name: str) -> str:
    """``name`` itself when it is a valid name; raises BadRequest, which says what one looks like."""
    # fullmatch: `$` alone would let a trailing newline pass.
    if _NAME.fullmatch(name):
        return name
    raise BadRequest(
        f"{name[:80]!r} is not a valid name of a {kind}: 1 to 63 of a-z, 0-9 and '-', "
        "beginning and ending with a letter or digit."
    )


def of_deployment(model: str, number: int) -> str:
    """The name of the Deployment that `deploy` makes for a version: ``digits-v2``."""
    name = f"{model}-v{number}"
    if _NAME.fullmatch(name):
        return name
    raise BadRequest(
        f"The Deployment would be called {name!r}, which is longer than 63 characters: "
        "give a shorter model name, or a name in the deployment's options."
    )
