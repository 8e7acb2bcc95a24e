"""The services as processes on the real servers: a registry with a model, router, gateway, autoscaler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import PATIENCE_S
from tests.integration.gateway.process import wait_ready
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.stack.ports import free_ports

TOKEN = "token"
PORTS = ("GATEWAY_PORT", "GATEWAY_GRPC_PORT", "REGISTRY_PORT", "ROUTER_PORT", "AUTOSCALER_PORT")


@contextmanager
def running(service: str, env: dict[str, str], folder: Path, *commands: str) -> Iterator[str]:
    """A service as a process of its own; its URL."""
    command = [sys.executable, "-m", f"services.{service}"]
    for each in commands:
        subprocess.run([*command, each], env=env, check=True)
    port, log = int(env[f"TIDEGATE_{service.upper()}_PORT"]), folder / f"{service}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        wait_ready(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE_S)
    assert code == 0, log.read_text()


@pytest.fixture(scope="module")
def services(rabbitmq_url, valkey_url, jobs_url) -> Iterator[dict[str, str]]:
    """The URLs of a registry that has a model, of the router that reads it, and of a gateway in front.

    The autoscaler has a registry of its own, which is empty: it starts no worker.
    """
    ports = dict(zip((*PORTS, "EMPTY"), map(str, free_ports(len(PORTS) + 1)), strict=True))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
        env |= {f"TIDEGATE_{name}": port for name, port in ports.items() if name != "EMPTY"}
        env |= {
            "TIDEGATE_SERVICE_TOKEN": TOKEN,
            "TIDEGATE_STATE_DIR": str(folder / "state"),
            "TIDEGATE_AMQP_URL": rabbitmq_url,
            "TIDEGATE_REDIS_URL": valkey_url,
            "TIDEGATE_JOBS_URL": jobs_url,
            "TIDEGATE_GATEWAY_PROCESSES": "1",
            "TIDEGATE_VERIFICATION": "off",
            # No worker starts here, so a load would wait for one.
            "TIDEGATE_MODEL_CONTROL": "off",
        }
        found = {"registry": stack.enter_context(running("registry", env, folder, "migrate"))}
        publish(found["registry"])
        found["router"] = stack.enter_context(running("router", env, folder))
        found["gateway"] = stack.enter_context(running("gateway", env, folder))
        empty = env | {
            "TIDEGATE_REGISTRY_PORT": ports["EMPTY"],
            "TIDEGATE_STATE_DIR": str(folder / "empty"),
            "TIDEGATE_REGISTRY_URL": f"http://127.0.0.1:{ports['EMPTY']}",
        }
        (folder / "other").mkdir()
        stack.enter_context(running("registry", empty, folder / "other", "migrate"))
        found["autoscaler"] = stack.enter_context(running("autoscaler", empty, folder))
        yield found


def publish(registry: str) -> None:
    """Register and deploy a model, asleep, so that there is something to find."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=registry, headers=headers, timeout=PATIENCE_S) as http:
        sha256 = http.put("/v1/artifacts", content=onnx_bytes()).raise_for_status().json()["sha256"]
        body = {"artifact": sha256, "filename": "model.onnx"}
        http.post("/v1/models/0/versions", json=body).raise_for_status()
        deployment = {"name": "0", "min_replicas": 0, "max_replicas": 1}
        http.post("/v1/deploy", json={"model": "0", "deployment": deployment}).raise_for_status()
