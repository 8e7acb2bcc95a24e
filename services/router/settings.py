"""Settings of the router; read by ``app.py`` only."""

from __future__ import annotations

from pydantic import Field

from tidegate.settings import Settings


class RouterSettings(Settings):
    """What only the router needs."""

    route_interval_s: float = Field(0.5, description="How often the router looks at workers, in seconds.")
    relist_interval_s: float = Field(
        2.0, description="How often the router re-reads the registry, in seconds."
    )
    blob_sweep_interval_s: float = Field(
        60.0, description="How often the router deletes expired large payloads, in seconds."
    )
    dead_letters_kept: int = Field(1000, description="How many dead letters the router keeps.")
