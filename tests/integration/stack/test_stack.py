"""The real embedded stack: up, a child that dies, a supervisor that dies, busy ports, down."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.gateway.certificates import Authority
from tidegate import stack
from tidegate.kernel.settings import file as settings_file
from tidegate.kernel.settings.base import Settings
from tidegate.stack import processes
from tidegate.stack.ports import free_ports
from tidegate.stack.record import ChildRecord

PORTS = (
    "gateway", "gateway_grpc", "registry", "router", "autoscaler",
    "rabbitmq", "rabbitmq_dist", "epmd", "valkey", "jobs",
)  # fmt: skip
PATIENCE_S = 120.0


def settings_in(folder: Path, **fields: Any) -> Settings:
    ports: dict[str, Any] = {
        f"{name}_port": port for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)
    }
    return Settings(state_dir=folder / "state", **(ports | {"monitoring": "off"} | fields))


def child(settings: Settings, name: str) -> ChildRecord:
    return next(c for c in stack.state(settings).children if c.name == name)


def pid_of(record: ChildRecord) -> int:
    assert record.process is not None
    return record.process.pid


def wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    found = settings_in(tmp_path)
    yield found
    stack.down(found)
    assert not processes.marked(found.state_path)


def test_the_life_of_a_stack(settings: Settings):
    told: list[tuple[str, str]] = []
    record = stack.up(settings, lambda p: told.append((p.name, p.state)))
    assert {c.state for c in record.children} == {"ready", "done"}
    assert ("gateway", "ready") in told
    _everything_listens_on_loopback(settings)

    again = stack.up(settings)
    assert again.supervisor == record.supervisor

    _a_dead_child_comes_back(settings)
    _another_stack_is_told_who_has_the_port(settings)
    _a_dead_supervisor_is_replaced(settings)

    assert stack.down(settings)
    assert not processes.marked(settings.state_path)
    assert stack.state(settings).phase == "stopped"
    assert not stack.down(settings)


def test_a_stack_with_a_certificate(tmp_path: Path):
    """The supervisor's probe and `tidegate status` use TLS."""
    Authority().sign("tide.example").write(tmp_path / "cert.pem", tmp_path / "key.pem")
    settings = settings_in(tmp_path, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")
    env = {f"TIDEGATE_{name.upper()}_PORT": str(getattr(settings, f"{name}_port")) for name in PORTS}
    env |= {
        "TIDEGATE_STATE_DIR": str(settings.state_path),
        "TIDEGATE_TLS_CERT": str(settings.tls_cert),
        "TIDEGATE_TLS_KEY": str(settings.tls_key),
    }
    try:
        record = stack.up(settings)
        assert {c.state for c in record.children} == {"ready", "done"}
        shown = subprocess.run(
            [sys.executable, "-m", "tidegate.cli", "status", "--json"],
            env=os.environ | env,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        stack.down(settings)
    services = {service["name"]: service for service in json.loads(shown.stdout)["services"]}
    assert services["gateway"]["state"] == "ready", services
    assert services["gateway"]["url"] == f"https://127.0.0.1:{settings.gateway_port}"


def _everything_listens_on_loopback(settings: Settings) -> None:
    pids = {p.pid for p in processes.marked(settings.state_path)}
    listening = {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.net_connections("inet")
        if c.pid in pids and c.status == psutil.CONN_LISTEN and c.laddr
    }
    assert {port for _, port in listening} == {getattr(settings, f"{name}_port") for name in PORTS}
    assert {address for address, _ in listening} <= {"127.0.0.1", "::1"}


def _a_dead_child_comes_back(settings: Settings) -> None:
    before = pid_of(child(settings, "valkey"))
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: child(settings, "valkey").restarts == 1 and child(settings, "valkey").state == "ready")
    assert pid_of(child(settings, "valkey")) != before


def _another_stack_is_told_who_has_the_port(settings: Settings) -> None:
    other = settings_in(settings.state_path.parent / "other", gateway_port=settings.gateway_port)
    with pytest.raises(stack.PortBusy) as refused:
        stack.up(other)
    gateway = pid_of(child(settings, "gateway"))
    assert f"Port {settings.gateway_port} is used by another Tidegate stack, pid {gateway}" in str(
        refused.value
    )
    assert f"TIDEGATE_STATE_DIR={settings.state_path} tidegate down" in str(refused.value)
    assert not processes.marked(other.state_path)


def _a_dead_supervisor_is_replaced(settings: Settings) -> None:
    before = stack.state(settings)
    assert before.supervisor is not None
    os.kill(before.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: stack.state(settings).phase == "unattended")
    after = stack.up(_with_a_setting_that_lasts(settings))
    _its_services_have_it(settings)
    assert after.supervisor != before.supervisor
    old = {c.process for c in before.children if c.process}
    assert not any(process.alive() for process in old)
    # Without a supervisor, `down` finds all processes itself.
    assert after.supervisor is not None
    os.kill(after.supervisor.pid, signal.SIGKILL)


def _with_a_setting_that_lasts(settings: Settings) -> Settings:
    """Write `TIDEGATE_AUTH=required` into the file and read the settings again."""
    settings_file.change(settings.state_path, {"TIDEGATE_AUTH": "required"})
    ports: dict[str, Any] = {f"{name}_port": getattr(settings, f"{name}_port") for name in PORTS}
    return Settings(state_dir=settings.state_path, **ports)


def _its_services_have_it(settings: Settings) -> None:
    token = (settings.state_path / "token").read_text().strip()

    def reported(url: str) -> dict[str, Any]:
        answer = httpx.get(
            url, headers={"Authorization": f"Bearer {token}"}, trust_env=False, timeout=PATIENCE_S
        )
        return {item["name"]: item for item in answer.raise_for_status().json()["items"]}

    gateway = reported(f"{settings.gateway_url}/v1/settings")
    assert (gateway["TIDEGATE_AUTH"]["value"], gateway["TIDEGATE_AUTH"]["source"]) == ("required", "file")
    assert gateway["TIDEGATE_SERVICE_TOKEN"]["value"] == "********"
    assert gateway["TIDEGATE_AUTH"]["on_restart"] is None
    assert (
        httpx.get(f"{settings.gateway_url}/v2/models", trust_env=False, timeout=PATIENCE_S).status_code == 401
    ), "it is in force"
    assert (
        httpx.get(f"{settings.gateway_url}/v1/settings", trust_env=False, timeout=PATIENCE_S).status_code
        == 401
    )
    settings_file.change(settings.state_path, {"TIDEGATE_AUTH": None, "TIDEGATE_LOG_LEVEL": "DEBUG"})
    gateway = reported(f"{settings.gateway_url}/v1/settings")
    assert gateway["TIDEGATE_AUTH"]["on_restart"] == "auto"
    assert (gateway["TIDEGATE_LOG_LEVEL"]["value"], gateway["TIDEGATE_LOG_LEVEL"]["on_restart"]) == (
        "INFO",
        "DEBUG",
    )
    for url in (settings.registry_url, settings.router_url, settings.autoscaler_url):
        assert reported(f"{url}/v1/settings")["TIDEGATE_LOG_LEVEL"]["on_restart"] == "DEBUG"
    workers = reported(f"{settings.autoscaler_url}/v1/settings/workers")
    assert workers["TIDEGATE_HEARTBEAT_INTERVAL_S"]["value"] == "0.5"
    assert workers["TIDEGATE_SERVICE_TOKEN"]["value"] == ""


def test_an_error_at_the_start_of_a_child_shows_its_log(tmp_path: Path):
    settings = settings_in(tmp_path, database_url="sqlite+aiosqlite:////proc/nowhere/registry.db")
    with pytest.raises(stack.ChildFailed) as failed:
        stack.up(settings)
    assert "migrate exited with" in str(failed.value)
    assert str(stack.log_file(settings.state_path, "migrate")) in str(failed.value)
    assert not processes.marked(settings.state_path)
    assert stack.state(settings).phase == "failed"


def test_a_busy_port_is_named_with_its_holder_and_the_setting(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(stack.PortBusy) as refused:
            stack.up(settings_in(tmp_path, registry_port=port))
    text = str(refused.value)
    assert f"Port {port} is used by pid {os.getpid()}" in text
    assert "TIDEGATE_REGISTRY_PORT" in text
