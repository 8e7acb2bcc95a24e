"""The launchers that the settings can name, put together."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.autoscaler.adapters.launcher_process import ProcessLauncher, ProcessPlan
from services.autoscaler.domain.launcher import Launcher
from services.autoscaler.settings import AutoscalerSettings

ROOT = Path(__file__).resolve().parents[2]

# What a worker must know alike, wherever it runs.
SHARED = {
    "amqp_url", "redis_url", "jobs_url", "registry_url", "blob_url", "claim_above_bytes", "ack_timeout_s",
    "job_ttl_s", "job_retention_s", "log_level", "model_sandbox",
}  # fmt: skip


def launcher_of(settings: AutoscalerSettings) -> Launcher:
    """The launcher that the settings name."""
    return docker_launcher(settings) if settings.launcher == "docker" else process_launcher(settings)


def process_launcher(settings: AutoscalerSettings) -> ProcessLauncher:
    """Workers as processes that run this very installation; they inherit its environment."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "TIDEGATE_RUNTIME_DIR": str(settings.runtime_path),
        **_shared(settings),
    }
    # -P: the folder that the stack was started in is not on the import path.
    command = [sys.executable, "-P", "-m", "services.worker", "--replica-dir"]
    return ProcessLauncher(ProcessPlan(command, settings.state_path, environment))


def docker_launcher(settings: AutoscalerSettings) -> Launcher:
    """Workers as containers of the image that the settings name."""
    # Imported here: the embedded stack starts without the engine's SDK.
    from services.autoscaler.adapters.container_spec import DockerPlan
    from services.autoscaler.adapters.engine import Engine
    from services.autoscaler.adapters.launcher_docker import DockerLauncher

    plan = DockerPlan(
        stack=settings.docker_stack,
        image=settings.docker_image,
        network=settings.docker_network,
        state_dir=settings.state_path,
        token=settings.service_token,
        environment={**_shared(settings), **settings.docker_environment},
        volumes=settings.docker_volumes,
        pull=settings.docker_pull,
        memory_mb=settings.docker_memory_mb,
        cpus=settings.docker_cpus,
        shm_mb=settings.docker_shm_mb,
        gpu_request=settings.docker_gpu_request,
        model_users=settings.model_sandbox != "off",
        log_driver=settings.docker_log_driver,
        log_options=settings.docker_log_options,
        compose_project=settings.docker_compose_project,
    )
    return DockerLauncher(plan, Engine(settings.docker_host))


def _shared(settings: AutoscalerSettings) -> dict[str, str]:
    values = settings.model_dump(include=SHARED)
    return {f"TIDEGATE_{name.upper()}": str(value) for name, value in values.items()}
