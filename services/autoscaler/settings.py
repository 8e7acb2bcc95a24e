"""Settings of the autoscaler, ``TIDEGATE_<FIELD>`` in the environment. Read by ``app.py`` only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from services.autoscaler.domain.log_retention import LogLimits
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.models import WarmPoolSpec
from tidegate.kernel.settings.base import Settings

# The folder that holds ``services`` and ``tidegate``: child processes import them from there.
ROOT = Path(__file__).resolve().parents[2]

_FLAVOUR = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class AutoscalerSettings(Settings):
    """Times are seconds."""

    service: ClassVar[str] = "autoscaler"

    launcher: Literal["process", "docker"] = Field(
        "process", description="How workers are started: as processes or as containers."
    )
    autoscaler_period_s: float = Field(
        0.5, gt=0, description="Time between two rounds of decisions, in seconds."
    )
    autoscaler_relist_s: float = Field(
        2.0, gt=0, description="Time between two reads of the registry, in seconds."
    )
    autoscaler_down_window_s: float = Field(
        30.0, ge=0, description="Window whose highest load counts for scaling down, in seconds."
    )
    autoscaler_idle_s: float = Field(
        60.0, ge=0, description="Idle time before scale to zero, in seconds, if the Deployment has none."
    )
    autoscaler_stuck_after_s: float = Field(
        15.0, gt=0, description="Seconds without a heartbeat after which a worker is replaced."
    )
    autoscaler_backoff_max_s: float = Field(
        60.0, ge=0, description="Longest wait before a worker is started again, in seconds."
    )
    autoscaler_host_memory: float = Field(
        0.95,
        gt=0,
        le=10,
        description="Share of the host's memory that may be in use when a replica is started; "
        "above 1 oversubscribes it.",
    )
    autoscaler_replicas_per_core: float = Field(
        16.0,
        gt=0,
        le=1000,
        description="Replicas for each core of the host; one that declares `cpus` counts as so many.",
    )
    autoscaler_replica_memory_mb: int = Field(
        256,
        ge=1,
        description="Memory that a replica counts with, in MiB, if it declares none and none was measured.",
    )
    autoscaler_starts_at_once: int = Field(
        0, ge=0, description="Replicas that start at the same time, on one host; 0: twice its cores."
    )
    autoscaler_decisions_kept: int = Field(5000, ge=1, description="Decisions that are kept on disk.")
    autoscaler_history_mb: int = Field(
        256,
        ge=0,
        description="Disk for recorded observations, which `replay` uses, in MiB; 0: none are kept.",
    )
    worker_log_days: float = Field(
        7.0, gt=0, description="How long the log of an ended replica is kept, in days."
    )
    worker_log_mb: int = Field(
        1024,
        ge=1,
        description="Disk for the logs of ended replicas, in MiB; one Deployment gets a quarter at most.",
    )
    autoscaler_warm: dict[str, WarmPoolSpec] = Field(
        default_factory=dict,
        description='Warm pool: workers that run Triton without a model, by flavour, as JSON: `{"cpu": 1}`.',
    )
    autoscaler_host_name: str = Field(
        "",
        description="Name of the machine that replicas run on, for `cordon`; default: its host name.",
    )

    docker_host: str = Field(
        "unix:///var/run/docker.sock", description="The container engine, or the proxy in front of it."
    )
    docker_stack: str = Field(
        "tidegate", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Prefix of the containers' names."
    )
    docker_image: str = Field(
        "tidegate/worker", description="The workers' image, if a Deployment names none."
    )
    docker_images: list[str] = Field(
        default_factory=list,
        description="Other images that Deployments may name, for the engine's proxy, as JSON; `*` is any.",
    )
    docker_pull: Literal["never", "missing", "always"] = Field(
        "missing", description="When images of workers are pulled."
    )
    docker_network: str = Field("tidegate", description="The network that workers join.")
    docker_volumes: dict[str, str] = Field(
        default_factory=dict, description="Named volumes of workers, and their mount points, as JSON."
    )
    docker_environment: dict[str, str] = Field(
        default_factory=dict, description="More variables for workers, as JSON; `PIP_INDEX_URL` for one."
    )
    docker_memory_mb: int = Field(
        0, ge=0, description="Memory of a worker in MiB, if its Deployment has no limit; 0: no limit."
    )
    docker_cpus: float = Field(
        0.0, ge=0, description="Cores of a worker, if its Deployment has no limit; 0: no limit."
    )
    docker_shm_mb: int = Field(
        256, ge=1, description="Shared memory of a worker in MiB, if its Deployment has no `shm_mb`."
    )
    docker_gpu_request: Literal["devices", "environment"] = Field(
        "devices",
        description="How the engine gets GPUs: `environment` if NVIDIA's runtime is its default.",
    )
    docker_log_driver: str = Field("json-file", description="The engine's log driver for workers.")
    docker_log_options: dict[str, str] = Field(
        default_factory=lambda: {"max-size": "10m", "max-file": "3"},
        description="Options of that log driver, as JSON.",
    )
    engine_socket: str = Field(
        "/var/run/docker.sock", description="The engine's socket, for the proxy in front of it."
    )
    engine_proxy_port: int = Field(2375, description="Port of the proxy in front of the engine.")
    engine_proxy_open: bool = Field(
        False,
        description="Accept callers without a token, on a network that only the autoscaler uses.",
    )
    docker_compose_project: str = Field(
        "", description="The compose project that workers belong to, so that `down` ends them."
    )

    @field_validator("autoscaler_warm", mode="before")
    @classmethod
    def _number_alone(cls, given: Any) -> Any:
        """``{"cpu": 1}`` is short for ``{"cpu": {"workers": 1}}``."""
        if not isinstance(given, dict):
            return given
        return {name: {"workers": it} if isinstance(it, int) else it for name, it in given.items()}

    @field_validator("autoscaler_warm")
    @classmethod
    def _named(cls, given: dict[str, WarmPoolSpec]) -> dict[str, WarmPoolSpec]:
        strange = [name for name in given if not _FLAVOUR.fullmatch(name)]
        if strange:
            raise ValueError(f"a flavour's name is of lower case letters, digits and -: not {strange[0]!r}")
        return given

    def log_limits(self) -> LogLimits:
        """What is kept of ended replicas' logs."""
        return LogLimits(self.worker_log_days * 86_400, self.worker_log_mb * 2**20)

    def policy(self) -> Policy:
        """The part of the settings that decisions depend on."""
        limit = self.docker_memory_mb if self.launcher == "docker" else 0
        return Policy(
            down_window_s=self.autoscaler_down_window_s,
            idle_s=self.autoscaler_idle_s,
            stuck_after_s=self.autoscaler_stuck_after_s,
            backoff_max_s=self.autoscaler_backoff_max_s,
            host_memory=self.autoscaler_host_memory,
            replicas_per_core=self.autoscaler_replicas_per_core,
            replica_memory_mb=limit or self.autoscaler_replica_memory_mb,
            starts_at_once=self.autoscaler_starts_at_once,
        )
