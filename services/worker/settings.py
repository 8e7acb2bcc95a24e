"""The settings of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tidegate.kernel.settings.base import Settings


class WorkerSettings(Settings):
    """The worker's settings: the common ones, and those that only the worker has."""

    service: ClassVar[str] = "worker"
    # A worker runs the code of users, so it must not get the service token. It gets only its replica's token,
    # which allows the download of one artifact.
    holds_service_token: ClassVar[bool] = False

    triton_server: Path | None = Field(
        None, description="Path of a native tritonserver; unset: the tritonserver from the wheel."
    )
    triton_backends: Path | None = Field(
        None, description="Folder of Triton's backends; unset: the folder that belongs to the tritonserver."
    )
    credentials_dir: Path | None = Field(
        None,
        description="Folder of the files that a Deployment's `llm.credential` may name; unset: `credentials` "
        "in the state folder.",
    )
    environment_timeout_s: float = Field(
        1800.0,
        description="Longest time in seconds that the installation of a version's requirements may take.",
    )
    cache_max_bytes: int = Field(
        50 * 2**30,
        ge=0,
        description="Maximum size in bytes of a host's cache of artifacts and environments. Above it, "
        "entries that no replica uses are deleted, the longest unused first. 0: no limit.",
    )
    cache_min_free_bytes: int = Field(
        2 * 2**30,
        ge=0,
        description="If the cache's disk has fewer free bytes than this, unused artifacts and environments "
        "are deleted.",
    )
    shared_memory_above_bytes: int = Field(
        128 * 1024,
        description="Tensors with more bytes than this are passed to Triton in shared memory; 0: shared "
        "memory is not used.",
    )
    max_fetched_bytes: int = Field(
        512 * 2**20,
        description="Maximum number of bytes that the tensors of large requests use in a worker's memory. "
        "Also the most bytes of one answer of an upstream with the Open Inference Protocol.",
    )
    heartbeat_interval_s: float = Field(0.5, description="Seconds between two heartbeats of a worker.")
    model_log_bytes_per_s: int = Field(
        64 * 1024,
        ge=1024,
        description="Maximum number of bytes of a model's output that a replica logs in a second; in a "
        "burst, 16 times as many. Each line is counted as 64 bytes longer than its text. "
        "Output above the limit is dropped.",
    )
    upstream_wait_s: float = Field(
        0.0,
        ge=0,
        description="Longest time in seconds that a job waits for an upstream that does not answer. 0: "
        "the job fails without a wait.",
    )
    worker_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of a worker's health checks and metrics on `host`; 0: a free port on loopback.",
    )

    @property
    def credentials_path(self) -> Path:
        """Return the folder of credentials for upstreams."""
        return (self.credentials_dir or self.state_path / "credentials").absolute()
