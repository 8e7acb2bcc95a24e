"""The settings of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tidegate.kernel.settings.base import Settings


class WorkerSettings(Settings):
    """The settings that only the worker has."""

    service: ClassVar[str] = "worker"
    # A worker runs models of users, so it only has its replica's token, which opens one artifact.
    holds_service_token: ClassVar[bool] = False

    triton_server: Path | None = Field(
        None, description="A native tritonserver binary instead of the wheel's."
    )
    triton_backends: Path | None = Field(None, description="Folder of that Triton's backends.")
    environment_timeout_s: float = Field(
        1800.0, description="How long installing a version's requirements may take, in seconds."
    )
    shared_memory_above_bytes: int = Field(
        128 * 1024, description="Tensors of more bytes than this reach Triton by shared memory; 0: none do."
    )
    max_fetched_bytes: int = Field(
        512 * 2**20, description="Large requests that a worker fetches ahead of its model, in bytes."
    )
    heartbeat_interval_s: float = Field(0.5, description="How often a worker reports, in seconds.")
    model_log_bytes_per_s: int = Field(
        64 * 1024,
        ge=1024,
        description="How much of its model's output a replica keeps, in bytes per second, after a burst of "
        "16 seconds' worth; a line counts 64 bytes more than it has. More is dropped and counted.",
    )
    worker_port: int = Field(
        0, ge=0, le=65535, description="Port of a worker's health and metrics on `host`; 0: any on loopback."
    )
