"""Settings of the worker; read by ``app.py`` only."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tidegate.settings import Settings


class WorkerSettings(Settings):
    """What only the worker needs."""

    triton_server: Path | None = Field(
        None, description="A native tritonserver binary instead of the wheel's."
    )
    triton_backends: Path | None = Field(None, description="Where that Triton has its backends.")
    environment_timeout_s: float = Field(
        1800.0, description="How long installing a version's requirements may take, in seconds."
    )
    heartbeat_interval_s: float = Field(0.5, description="How often a worker reports, in seconds.")
