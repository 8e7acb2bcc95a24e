"""The settings and the folder of the stack on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.cli import api, source_checkout
from tidegate.client import contexts
from tidegate.kernel.errors import TidegateError

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings


class StackFailed(TidegateError):
    """An error at the start or stop of the stack. The message says what to do."""

    reason = "stack"


def own(*, starting: bool) -> Settings:
    """Return the settings of the stack on this machine.

    ``starting``: True for the settings of the next start, False for the settings of the last start.
    """
    from tidegate.client import started

    state = _own_folder(starting=starting)
    fields: dict[str, Any] = {} if state is None else {"state_dir": state}
    if not starting:
        address = started.read(own_folder()).address
        fields |= {k: v for k, v in address.items() if not os.environ.get(f"TIDEGATE_{k.upper()}")}
    return api.settings_with(fields)


def own_folder() -> Path:
    """Return the state folder of the stack on this machine."""
    stated = os.environ.get("TIDEGATE_STATE_DIR") or contexts.STATE
    return _own_folder(starting=False) or Path(stated).absolute()


def _own_folder(*, starting: bool) -> Path | None:
    return contexts.find_own(
        api.chosen.get(), os.environ, Path.cwd(), contexts.read(), source_checkout.root(), starting=starting
    )
