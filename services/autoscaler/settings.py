"""Settings of the autoscaler: ``TIDEGATE_<FIELD>`` in the environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from services.autoscaler.domain.log_retention import LogLimits
from services.autoscaler.domain.snapshot import Policy
from tidegate.kernel.protocol.warm_pool import WarmPoolSpec
from tidegate.kernel.settings.base import Settings

# The folder that contains ``services`` and ``tidegate``. Child processes import both from there.
ROOT = Path(__file__).resolve().parents[2]

_POOL_NAME = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class AutoscalerSettings(Settings):
    """The settings of the autoscaler. Times are in seconds."""

    service: ClassVar[str] = "autoscaler"

    launcher: Literal["process", "docker"] = Field(
        "process", description="How workers are started: `process`, or `docker` for containers."
    )
    autoscaler_period_s: float = Field(0.5, gt=0, description="Seconds between two rounds of decisions.")
    autoscaler_relist_s: float = Field(2.0, gt=0, description="Seconds between two reads of the registry.")
    autoscaler_down_window_s: float = Field(
        30.0,
        ge=0,
        description="Length of the scale-down window in seconds. "
        "Replicas are removed only down to the highest need in this window.",
    )
    autoscaler_idle_s: float = Field(
        60.0, ge=0, description="Idle seconds before scale to zero, if the Deployment sets no value."
    )
    autoscaler_stuck_after_s: float = Field(
        15.0, gt=0, description="Seconds without a heartbeat after which a worker is replaced."
    )
    autoscaler_backoff_max_s: float = Field(
        60.0, ge=0, description="Longest wait, in seconds, before a failed worker is started again."
    )
    autoscaler_host_memory: float = Field(
        0.95,
        gt=0,
        le=10,
        description="Share of the host's memory that may be in use after the start of a replica. "
        "Above 1, memory is oversubscribed.",
    )
    autoscaler_replicas_per_core: float = Field(
        16.0,
        gt=0,
        le=1000,
        description="Maximum number of replicas per core of the host. A replica of a Deployment "
        "with `cpus: 4` counts as 4 replicas.",
    )
    autoscaler_replica_memory_mb: int = Field(
        256,
        ge=1,
        description="Assumed memory in MiB of a replica that has no `memory_mb` and was not measured yet.",
    )
    autoscaler_starts_at_once: int = Field(
        0, ge=0, description="How many replicas may start at the same time on one host. 0: twice its cores."
    )
    autoscaler_decisions_kept: int = Field(5000, ge=1, description="How many decisions are kept on disk.")
    autoscaler_history_mb: int = Field(
        256,
        ge=0,
        description="Disk space in MiB for recorded rounds, which `tidegate replay --verify` decides again. "
        "0: no rounds are recorded.",
    )
    autoscaler_costs_days: int = Field(
        400,
        ge=1,
        description="How many days the costs of replicas are kept. "
        "After 35 days, costs are kept by day instead of by hour.",
    )
    worker_log_days: float = Field(
        7.0, gt=0, description="How many days the log of an ended replica is kept."
    )
    worker_log_mb: int = Field(
        1024,
        ge=1,
        description="Disk space in MiB for the logs of ended replicas; at most a quarter for one Deployment.",
    )
    autoscaler_warm: dict[str, WarmPoolSpec] = Field(
        default_factory=dict,
        description='Warm pools as JSON, such as `{"cpu": 1}`: '
        "for each pool, the number of workers that run Triton without a model.",
    )
    autoscaler_host_name: str = Field(
        "",
        description="Name of the replicas' machine, for `tidegate cordon`. Default: its host name.",
    )

    docker_host: str = Field(
        "unix:///var/run/docker.sock",
        description="URL of the container engine, or of the proxy in front of it.",
    )
    docker_stack: str = Field(
        "tidegate", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Prefix of the containers' names."
    )
    docker_image: str = Field(
        "tidegate/worker", description="Image of the workers of a Deployment that names no image."
    )
    docker_images: list[str] = Field(
        default_factory=list,
        description="Other images that the container engine's proxy allows Deployments to name: "
        "a JSON list of patterns, in which `*` matches any text.",
    )
    docker_pull: Literal["never", "missing", "always"] = Field(
        "missing",
        description="When an image of workers is pulled: `never`, `always` or `missing`. "
        "`missing`: only if the container engine does not have the image.",
    )
    docker_network: str = Field("tidegate", description="The container engine's network for workers.")
    docker_volumes: dict[str, str] = Field(
        default_factory=dict, description="Named volumes of workers and their mount points, as JSON."
    )
    docker_environment: dict[str, str] = Field(
        default_factory=dict, description="Additional variables of workers, such as `PIP_INDEX_URL`, as JSON."
    )
    docker_memory_mb: int = Field(
        0, ge=0, description="Memory limit of a worker in MiB, if its Deployment has none. 0: no limit."
    )
    docker_cpus: float = Field(
        0.0, ge=0, description="Core limit of a worker, if its Deployment has none. 0: no limit."
    )
    docker_shm_mb: int = Field(
        256, ge=1, description="Shared memory of a worker in MiB, if its Deployment has no `shm_mb`."
    )
    docker_gpu_request: Literal["devices", "environment"] = Field(
        "devices",
        description="How GPUs are requested. `devices`: by device requests. `environment`: by an environment "
        "variable, which works only if NVIDIA's runtime is the container engine's default.",
    )
    docker_log_driver: str = Field("json-file", description="The container engine's log driver for workers.")
    docker_log_options: dict[str, str] = Field(
        default_factory=lambda: {"max-size": "10m", "max-file": "3"},
        description="Options of the workers' log driver, as JSON.",
    )
    engine_socket: str = Field(
        "/var/run/docker.sock",
        description="Unix socket of the container engine. The proxy in front of the engine connects to it.",
    )
    engine_proxy_port: int = Field(2375, description="Port of the container engine's proxy.")
    engine_proxy_open: bool = Field(
        False,
        description="The container engine's proxy accepts callers without a token. "
        "Only for a network that nothing but the autoscaler uses.",
    )
    docker_compose_project: str = Field(
        "", description="Compose project to which workers belong, so that compose's `down` ends the workers."
    )

    @field_validator("autoscaler_warm", mode="before")
    @classmethod
    def _expand_numbers(cls, value: Any) -> Any:
        """Accept a plain number of workers: read ``{"cpu": 1}`` as ``{"cpu": {"workers": 1}}``."""
        if not isinstance(value, dict):
            return value
        return {name: {"workers": it} if isinstance(it, int) else it for name, it in value.items()}

    @field_validator("autoscaler_warm")
    @classmethod
    def _check_names(cls, pools: dict[str, WarmPoolSpec]) -> dict[str, WarmPoolSpec]:
        strange = [name for name in pools if not _POOL_NAME.fullmatch(name)]
        if strange:
            raise ValueError(
                f"a pool's name may contain only lower case letters, digits and -; found {strange[0]!r}"
            )
        return pools

    def log_limits(self) -> LogLimits:
        """Return the limits of age and size for the logs of ended replicas."""
        return LogLimits(self.worker_log_days * 86_400, self.worker_log_mb * 2**20)

    def policy(self) -> Policy:
        """Return the settings that the autoscaler's decisions depend on."""
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
