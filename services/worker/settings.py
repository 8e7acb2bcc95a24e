"""The settings of the worker."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tidegate.kernel.settings.base import Settings


class WorkerSettings(Settings):
    """The settings that only the worker has."""

    service: ClassVar[str] = "worker"
    # A worker runs the code of users. So it has only the replica's token, which allows the download of one
    # artifact.
    holds_service_token: ClassVar[bool] = False

    triton_server: Path | None = Field(
        None, description="A native tritonserver binary instead of the wheel's."
    )
    triton_backends: Path | None = Field(None, description="Folder of that Triton's backends.")
    credentials_dir: Path | None = Field(
        None,
        description="Folder of the files that a Deployment's `llm.credential` may name; unset: `credentials` "
        "in the state folder.",
    )
    environment_timeout_s: float = Field(
        1800.0, description="Most seconds that the installation of a version's requirements may take."
    )
    shared_memory_above_bytes: int = Field(
        128 * 1024,
        description="Tensors with more bytes than this are passed to Triton in shared memory; 0: none are.",
    )
    max_fetched_bytes: int = Field(
        512 * 2**20,
        description="Most bytes of large requests that a worker fetches before their model call, and of one "
        "answer of an upstream with the Open Inference Protocol.",
    )
    heartbeat_interval_s: float = Field(0.5, description="Seconds between two heartbeats of a worker.")
    model_log_bytes_per_s: int = Field(
        64 * 1024,
        ge=1024,
        description="Most bytes per second of its model's output that a replica logs; a burst may have 16 "
        "seconds' bytes. Each line counts 64 bytes more than its text. More is dropped and counted.",
    )
    upstream_wait_s: float = Field(
        0.0,
        ge=0,
        description="How long a job waits for its Deployment's upstream while that does not answer, in "
        "seconds. 0: it fails.",
    )
    worker_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="Port of a worker's health and metrics on `host`; 0: any free port on loopback.",
    )

    @property
    def credentials_path(self) -> Path:
        """Return the folder of credentials for upstreams."""
        return (self.credentials_dir or self.state_path / "credentials").absolute()
