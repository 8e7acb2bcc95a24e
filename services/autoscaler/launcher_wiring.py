"""Build the launcher that the settings choose."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from services.autoscaler.adapters.process.launcher import ProcessLauncher, ProcessPlan
from services.autoscaler.adapters.process.machine_probe import MachineProbe
from services.autoscaler.domain.launcher import Launcher
from services.autoscaler.domain.snapshot import HostProbe
from services.autoscaler.settings import ROOT, AutoscalerSettings
from tidegate.kernel import credentials
from tidegate.kernel.protocol.access import engine_token

# Settings of the autoscaler that each worker gets as environment variables.
SHARED = {
    "registry_url", "blob_url", "claim_above_bytes", "ack_timeout_s", "job_ttl_s", "job_retention_s",
    "log_level", "model_sandbox",
}  # fmt: skip

# A worker does not inherit these variables, because its model could read the secrets in them.
WITHHELD = frozenset({"TIDEGATE_SERVICE_TOKEN", "TIDEGATE_API_KEY", "TIDEGATE_DATABASE_URL"})


def launcher_of(settings: AutoscalerSettings) -> tuple[Launcher, HostProbe]:
    """Return the launcher that the settings choose, and the probe that reads the resources of its host."""
    if settings.launcher == "docker":
        return docker_launcher(settings)
    return process_launcher(settings), MachineProbe()


def worker_environment(settings: AutoscalerSettings) -> dict[str, str]:
    """Return the environment variables for a new worker."""
    if settings.launcher == "docker":
        path = {"PATH": os.environ.get("PATH", "")}
        return {**path, **_traces(), **_shared(settings), **settings.docker_environment}
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
        "TIDEGATE_RUNTIME_DIR": str(settings.runtime_path),
        **_shared(settings),
    }
    inherited = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    return {**inherited, **environment}


def process_launcher(settings: AutoscalerSettings) -> ProcessLauncher:
    """Return the launcher that starts workers as processes.

    The processes run this installation and inherit most of the autoscaler's environment.
    """
    # -P keeps the current folder off the import path, so that a file there cannot replace a module.
    command = [sys.executable, "-P", "-m", "services.worker", "--replica-dir"]
    plan = ProcessPlan(
        command,
        settings.state_path,
        settings.service_token,
        worker_environment(settings),
        logs=settings.log_limits(),
    )
    return ProcessLauncher(plan)


def docker_launcher(settings: AutoscalerSettings) -> tuple[Launcher, HostProbe]:
    """Return the launcher of containers, and the probe that reads the resources of Docker's host."""
    # These imports are here, so that the embedded stack starts without Docker's SDK.
    from services.autoscaler.adapters.docker.container_spec import DockerPlan
    from services.autoscaler.adapters.docker.engine import Engine
    from services.autoscaler.adapters.docker.engine_probe import EngineProbe
    from services.autoscaler.adapters.docker.launcher import DockerLauncher

    plan = DockerPlan(
        stack=settings.docker_stack,
        image=settings.docker_image,
        network=settings.docker_network,
        state_dir=settings.state_path,
        logs=settings.log_limits(),
        token=settings.service_token,
        secrets=worker_secrets(settings.secrets_path),
        environment={**_traces(), **_shared(settings), **settings.docker_environment},
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
    # The proxy in front of Docker checks a token. Docker's own socket does not, so the token is not sent
    # there.
    behind_proxy = not settings.docker_host.startswith("unix:")
    token = engine_token(settings.service_token) if behind_proxy else ""
    engine = Engine(settings.docker_host, token)
    return DockerLauncher(plan, engine), EngineProbe(engine)


def _traces() -> dict[str, str]:
    """Return the variables of OpenTelemetry, so that workers export traces like the gateway."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and value}


def _shared(settings: AutoscalerSettings) -> dict[str, str]:
    values = settings.model_dump(include=SHARED)
    # ``server_urls`` has the URLs without the autoscaler's passwords. Each worker adds its own passwords.
    values |= {name: url for name, url in settings.server_urls.items() if url}
    return {f"TIDEGATE_{name.upper()}": str(value) for name, value in values.items()}


def worker_secrets(folder: Path) -> dict[str, bytes]:
    """Return a worker's passwords from the secrets folder, each under the relative path of its file."""
    found = {f"{server}/worker": credentials.read(folder, server, "worker") for server in credentials.SERVERS}
    return {path: password.encode() for path, password in found.items() if password}
