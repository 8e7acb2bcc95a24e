"""Compute the processes of a stack from its settings. This module starts none of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from tidegate.kernel import credentials
from tidegate.kernel.broker.permissions import JOB_STORE, LIVE_STORE
from tidegate.kernel.settings.base import COMPUTED, ENVIRONMENT, FILE, SOURCES, Settings
from tidegate.stack import accounts, profiles, prometheus, rabbitmq, valkey
from tidegate.stack.child import MARK, Child, Port, Probe
from tidegate.stack.errors import MissingPart

SERVICES = ("registry", "router", "autoscaler", "gateway")
"""In the order in which ``status`` shows them."""

CONTROL = "control"

# A service with a lower number stops earlier. The autoscaler stops first, so that it starts no replica while
# replicas stop. The gateway stops before the services that it needs.
STOP_ORDER = {"autoscaler": 10, "gateway": 20, "router": 30, "registry": 40}
SWEEP_LIMIT_S = 60.0
# The gateway gets more time to stop, because on SIGTERM it answers the requests in flight, for up to 30 s.
GRACE_S = {"gateway": 40.0}


def plan(settings: Settings, environ: Mapping[str, str]) -> tuple[Child, ...]:
    """Return the processes of the stack in the order of their start. Leave out external servers."""
    state = settings.state_path
    env = _environment(settings, environ)
    servers: list[Child] = []
    rabbitmq_passwords, valkey_passwords, jobs_passwords = (
        credentials.read_all(settings.secrets_path, server) for server in credentials.SERVERS
    )
    if is_embedded(settings.amqp_url, settings.rabbitmq_port):
        servers += rabbitmq.children(
            state / "data" / "rabbitmq",
            port=settings.rabbitmq_port,
            dist_port=settings.rabbitmq_dist_port,
            epmd_port=settings.epmd_port,
            ack_timeout_s=settings.ack_timeout_s,
            environ=env,
            definitions=accounts.rabbitmq_definitions(rabbitmq_passwords),
            small=settings.profile == profiles.EDGE,
        )
    if is_embedded(settings.redis_url, settings.valkey_port):
        servers.append(
            valkey.child(
                state / "data" / "valkey",
                port=settings.valkey_port,
                environ=env,
                users=accounts.valkey_users(valkey_passwords, LIVE_STORE),
                login=_login(settings, credentials.VALKEY),
            )
        )
    if is_embedded(settings.jobs_url, settings.jobs_port):
        servers.append(
            valkey.jobs_child(
                state / "data" / "jobs",
                port=settings.jobs_port,
                environ=env,
                users=accounts.valkey_users(jobs_passwords, JOB_STORE),
                login=_login(settings, credentials.VALKEY_JOBS),
            )
        )
    migrate = Child(
        name="migrate",
        argv=(*_module("services.registry"), "migrate"),
        env=env,
        probe=None,
        stop_order=0,
        folders=(state / "data",),
    )
    needed = tuple(server.name for server in servers)
    if profiles.together(settings):
        control = _control(settings, env, needed)
        gateway = _service("gateway", settings, env, needed)
        return (*servers, migrate, control, replace(gateway, after=(*needed, control.name)))
    services = (_service(name, settings, env, needed) for name in SERVICES)
    return (*servers, migrate, *services, *_monitoring(settings, env))


def _control(settings: Settings, env: Mapping[str, str], needed: tuple[str, ...]) -> Child:
    """Return the single process that runs registry, router and autoscaler.

    It is ready when the autoscaler is ready.
    """
    autoscaler = _service("autoscaler", settings, env, needed)
    ports = [_service(name, settings, env, needed).ports for name in ("registry", "router")]
    return replace(
        autoscaler,
        name=CONTROL,
        argv=_module("services.control"),
        ports=(*(port for each in ports for port in each), *autoscaler.ports),
        after=(*needed, "migrate"),
    )


def _monitoring(settings: Settings, env: Mapping[str, str]) -> tuple[Child, ...]:
    """Return the process of Prometheus; empty if Prometheus is switched off or not installed.

    Raise MissingPart if the settings require Prometheus and it is not installed.
    """
    program = prometheus.installed() if settings.monitoring != "off" else None
    if program is None:
        if settings.monitoring == "on":
            raise MissingPart(prometheus.MISSING)
        return ()
    required = settings.monitoring == "on"
    place = prometheus.place(settings, prometheus.version_of(program))
    return (replace(prometheus.child(program, place, env), optional=not required),)


def _service(name: str, settings: Settings, env: Mapping[str, str], needed: tuple[str, ...]) -> Child:
    port: int = getattr(settings, f"{name}_port")
    ports: tuple[Port, ...] = (Port(port, f"TIDEGATE_{name.upper()}_PORT", settings.host),)
    if name == "gateway":
        ports += (Port(settings.gateway_grpc_port, "TIDEGATE_GATEWAY_GRPC_PORT", settings.host),)
    probe_host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host
    return Child(
        name=name,
        argv=_module(f"services.{name}"),
        env=env,
        probe=Probe("https" if name == "gateway" and settings.tls_cert else "http", port, probe_host),
        stop_order=STOP_ORDER[name],
        ports=ports,
        # The registry starts without waiting for RabbitMQ and Valkey, because its own code waits for them.
        # The other services start when the registry is ready.
        after=("migrate",) if name == "registry" else (*needed, "registry"),
        after_stop=(*_module("services.autoscaler"), "sweep") if name == "autoscaler" else (),
        grace_s=GRACE_S.get(name, 15.0),
        sockets=dict(zip(("http", "grpc"), ports, strict=True)) if name == "gateway" else {},
        processes=_gateway_processes(env) if name == "gateway" else 1,
    )


def _gateway_processes(env: Mapping[str, str]) -> int:
    """Return the number of gateway processes; 1 if the setting is missing or wrong.

    If the setting is wrong, the gateway itself reports this.
    """
    value = env.get("TIDEGATE_GATEWAY_WORKERS", "")
    return max(1, int(value)) if value.isdecimal() else 1


def _login(settings: Settings, server: str) -> tuple[str, Path]:
    return "registry", settings.secrets_path / server / "registry"


def _module(name: str) -> tuple[str, ...]:
    # The option -P prevents imports from the current folder. Otherwise, a file there could replace a module
    # with the same name.
    return (sys.executable, "-P", "-m", name)


def _environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of every child: the resolved settings, and the stack's mark (``MARK``)."""
    mine = {"service_token", "api_key", "runtime_dir", "state_dir"}
    values = settings.model_dump(exclude=mine, exclude_none=True)
    # The URLs contain no passwords, because each child reads its own password.
    values |= settings.server_urls
    ours = {f"TIDEGATE_{name.upper()}": str(value) for name, value in values.items()}
    # Copy the current values of the settings file to the environment. So a child that is restarted later gets
    # the same values, even if the file has changed.
    file = {name: value for name, value in settings.file_values.items() if value and not environ.get(name)}
    sources = json.loads(environ.get(SOURCES) or "{}") | dict.fromkeys(file, FILE)
    for name, source in settings.sources().items():
        if source != ENVIRONMENT and name not in {"service_token", "api_key"}:
            sources[f"TIDEGATE_{name.upper()}"] = source
    profile = profiles.defaults(settings, environ)
    sources |= dict.fromkeys(profile, COMPUTED)
    fixed = {SOURCES: json.dumps(sources), "PYTHONUNBUFFERED": "1"}
    process = profiles.process_environment(settings, environ)
    return dict(environ) | file | ours | profile | process | _folders(settings) | fixed


def _folders(settings: Settings) -> dict[str, str]:
    return {
        "TIDEGATE_STATE_DIR": str(settings.state_path),
        "TIDEGATE_RUNTIME_DIR": str(settings.runtime_path),
        MARK: str(settings.state_path),
    }


def is_embedded(url: str, port: int) -> bool:
    """Return True if the URL names the stack's own server."""
    parts = urlsplit(url)
    return parts.hostname in {"127.0.0.1", "localhost"} and parts.port == port


def log_file(state: Path, name: str) -> Path:
    """Return the path of a child's log."""
    return state / "log" / f"{name}.log"
