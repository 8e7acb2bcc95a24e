"""``up --profile``: choose the profile of the stack on this machine, for this start and later ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.own_stack import StackFailed

if TYPE_CHECKING:
    from tidegate.kernel.settings.base import Settings
    from tidegate.stack.record import StackRecord

VARIABLE = "TIDEGATE_PROFILE"
CONTROL = "control"


def chosen(found: Settings, profile: str, record: StackRecord) -> Settings:
    """Return the settings for a start with ``profile``, and store the profile in tidegate.env.

    Raise UsageError for an unknown profile. If the stack already runs with another profile, raise
    StackFailed. If it already runs with this profile, store nothing and return ``found``.
    """
    from tidegate.kernel.settings import file

    known = get_args(type(found).model_fields["profile"].annotation)
    if profile not in known:
        raise UsageError(f"--profile {profile}: choose one of {', '.join(known)}.")
    if record.supervisor is not None:
        if profile != running(record):
            raise StackFailed(
                f"The stack runs with the profile {running(record)}. To change it, type `tidegate down`, and "
                f"then `tidegate up --profile {profile}`."
            )
        return found
    file.change(found.state_path, {VARIABLE: profile if profile != "default" else None})
    return found.model_copy(update={"profile": profile})


def running(record: StackRecord) -> str:
    """Return the profile of a running stack."""
    return "edge" if any(child.name == CONTROL for child in record.children) else "default"
