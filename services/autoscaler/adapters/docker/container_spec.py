"""Build the request with which the container engine creates a replica's container."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.autoscaler.domain.engine_rules import CAPABILITIES, ROOT
from services.autoscaler.domain.gpus import Shares, to_label
from services.autoscaler.domain.launcher import LaunchSpec
from services.autoscaler.domain.log_retention import LogLimits

MIB = 1024 * 1024
PIDS_LIMIT = 4096

STACK = "tidegate.stack"
REPLICA = "tidegate.replica"
FINGERPRINT = "tidegate.fingerprint"
LAUNCHED_AT = "tidegate.launched-at"
DRAIN_LIMIT = "tidegate.drain-limit-s"
IMAGE_DIGEST = "tidegate.image-digest"
GPUS = "tidegate.gpus"
DEFAULTS = "tidegate.defaults"

Pull = Literal["never", "missing", "always"]
# The ways to request GPUs from the container engine. "devices" uses device requests. "environment" uses an
# environment variable, which works only if NVIDIA's runtime is the default runtime of the container engine.
GpuRequest = Literal["devices", "environment"]


@dataclass(frozen=True, slots=True)
class DockerPlan:
    """The settings for workers as containers. Memory is in MiB; 0 means no limit.

    - ``stack``: the prefix of container names, so that several stacks can share a container engine
    - ``token``: the service token, from which the tokens of replicas are derived
    - ``secrets``: the content of each secret file of a worker, by path
    - ``volumes``: the mount point of each named volume
    - ``home``: the state folder in the container
    - ``compose_project``: if set, `docker compose down` for this project also ends the workers
    - ``model_users``: True if the worker runs its model as another user. Then the worker runs as root, but
      has only the capabilities that it needs for this.
    """

    stack: str
    image: str
    network: str
    state_dir: Path
    token: str
    secrets: Mapping[str, bytes] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[str, str] = field(default_factory=dict)
    home: str = "/var/lib/tidegate"
    command: Sequence[str] | None = None
    pull: Pull = "missing"
    memory_mb: int = 0
    cpus: float = 0.0
    shm_mb: int = 256
    gpu_request: GpuRequest = "devices"
    model_users: bool = True
    log_driver: str = "json-file"
    log_options: Mapping[str, str] = field(default_factory=dict)
    compose_project: str = ""
    logs: LogLimits | None = None

    def name(self, replica: str) -> str:
        """Return the container's name. Its dot prevents a clash with the names that compose makes."""
        return f"{self.stack}.{replica}"

    @property
    def defaults(self) -> str:
        """Return a digest of all settings that a worker gets in addition to its assignment.

        Each worker's container has a label with this digest. If a label differs from the present digest, the
        worker was started with outdated settings.
        """
        base = (self.image, sorted(self.environment.items()), sorted(self.volumes.items()), self.network)
        limits = (self.memory_mb, self.cpus, self.shm_mb, self.gpu_request, self.command, self.model_users)
        keys = (self.token, sorted(self.secrets.items()))
        return hashlib.sha256(repr((base, limits, keys)).encode()).hexdigest()[:16]

    def memory_of(self, start: LaunchSpec) -> int:
        """Return the memory limit of a replica in MiB; 0 means no limit."""
        return start.resources.memory_mb or self.memory_mb


def body(plan: DockerPlan, start: LaunchSpec, image: str, digest: str, gpus: Shares) -> dict[str, Any]:
    """Return the request that creates the container."""
    environment = dict(plan.environment)
    if plan.secrets:
        environment["TIDEGATE_SECRETS_DIR"] = f"{plan.home}/secrets"
    if plan.gpu_request == "environment":
        environment["NVIDIA_VISIBLE_DEVICES"] = ",".join(sorted(gpus)) or "void"
    made: dict[str, Any] = {
        "Image": image,
        "Env": [f"{key}={value}" for key, value in sorted(environment.items())],
        "Labels": _labels(plan, start, digest, gpus),
        # Another program may stop this container. Then the engine sends this signal to the worker. The engine
        # kills the worker only if it still runs after this timeout (seconds). So the worker has time to
        # drain.
        "StopSignal": "SIGTERM",
        "StopTimeout": int(start.drain_limit_s) + 10,
        "HostConfig": _host_config(plan, start, gpus),
    }
    if plan.model_users:
        made["User"] = ROOT
    if plan.command is not None:
        made["Cmd"] = list(plan.command)
    return made


def _labels(plan: DockerPlan, start: LaunchSpec, digest: str, gpus: Shares) -> dict[str, str]:
    labels = {
        STACK: plan.stack,
        REPLICA: start.replica,
        FINGERPRINT: start.fingerprint,
        LAUNCHED_AT: f"{start.launched_at:.3f}",
        DRAIN_LIMIT: f"{start.drain_limit_s:g}",
        IMAGE_DIGEST: digest,
        DEFAULTS: plan.defaults,
    }
    if gpus:
        labels[GPUS] = to_label(gpus)
    if plan.compose_project:
        # These labels say that the worker belongs to a service ``replica``. The compose file has no such
        # service. So compose's `up` ignores workers, and its `down --remove-orphans` ends them.
        labels |= {
            "com.docker.compose.project": plan.compose_project,
            "com.docker.compose.service": "replica",
            "com.docker.compose.oneoff": "False",
            "com.docker.compose.container-number": "1",
        }
    return labels


def _host_config(plan: DockerPlan, start: LaunchSpec, gpus: Shares) -> dict[str, Any]:
    resources = start.resources
    memory = plan.memory_of(start) * MIB
    config: dict[str, Any] = {
        "NetworkMode": plan.network,
        # The autoscaler, and not the container engine, decides about restarts.
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        # An init process forwards signals, and reaps the processes of a killed worker.
        "Init": True,
        "CapDrop": ["ALL"],
        "CapAdd": list(CAPABILITIES) if plan.model_users else [],
        "SecurityOpt": ["no-new-privileges"],
        "PidsLimit": PIDS_LIMIT,
        "ShmSize": (resources.shm_mb or plan.shm_mb) * MIB,
        "Memory": memory,
        "MemorySwap": memory,  # no swap: a worker above its limit is killed, instead of becoming very slow
        "NanoCpus": int((resources.cpus or plan.cpus) * 1e9),
        "LogConfig": {"Type": plan.log_driver, "Config": dict(plan.log_options)},
        "Mounts": [
            {"Type": "volume", "Source": volume, "Target": path}
            for volume, path in sorted(plan.volumes.items())
        ],
    }
    if gpus and plan.gpu_request == "devices":
        config["DeviceRequests"] = [
            {"Driver": "nvidia", "DeviceIDs": sorted(gpus), "Capabilities": [["gpu", "utility", "compute"]]}
        ]
    return config
