"""Which reading of the registry may replace the last good one."""

from __future__ import annotations

from tidegate.protocol.models import Intention


def acceptable(current: Intention | None, fresh: Intention) -> bool:
    """Whether ``fresh`` may replace ``current``.

    A reading without any Deployment stops everything that runs. It is believed when it continues the
    history (the last Deployment was deleted), not when the history starts again: then the registry
    has lost its data, and what runs goes on.
    """
    if current is None or fresh.deployments or not current.deployments:
        return True
    return fresh.revision >= current.revision
