"""One stack of containers for all tests here, from nothing to nothing, beside what else the engine runs."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.compose import images, stack, tool
from deploy.compose.tool import Tool
from tidegate.client import Client
from tidegate.stack.ports import free_ports

# The stack stays for a look; `COMPOSE_PROJECT_NAME=.. python3 -m deploy.compose down --volumes` ends it.
KEEP = bool(os.environ.get("COMPOSE_TEST_KEEP"))
MAY_FETCH = bool(os.environ.get("COMPOSE_TEST_FETCH"))


class World:
    """The stack as its users and its operators see it."""

    def __init__(self, found: Tool, key: str, gateway: int, prometheus: int, took_s: float) -> None:
        self.tool = found
        self.key = key
        self.url = f"http://127.0.0.1:{gateway}"
        self.prometheus = f"http://127.0.0.1:{prometheus}"
        self.took_s = took_s
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False
        )

    def client(self) -> Client:
        """What users have."""
        return Client(self.url, api_key=self.key)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """A call of the control plane, through the gateway."""
        answer = self.http.request(method, path, json=body)
        assert answer.status_code < 400, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def status(self, deployment: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/api/autoscaler/v1/deployments/{deployment}")
        return found

    def workers(self, deployment: str = "") -> dict[str, str]:
        """The running workers as `docker ps` shows them: container's name by replica.

        The first replica of a version runs in the container of its scratch replica, and keeps the label.
        """
        items = self.ask("GET", "/api/autoscaler/v1/replicas")["items"]
        replicas = {each["worker"]: each["replica"] for each in items if "worker" in each}
        listed = self.tool.engine(
            "ps", "--filter", f"label=tidegate.stack={self.tool.project}",
            "--format", '{{.Label "tidegate.replica"}} {{.Names}}',
        )  # fmt: skip
        lines = [line.split() for line in listed.splitlines() if len(line.split()) == 2]
        found = {replicas.get(label, label): name for label, name in lines}
        return {replica: name for replica, name in found.items() if replica.startswith(deployment)}

    def container(self, service: str) -> dict[str, Any]:
        return next(
            each
            for each in self.tool.containers()
            if each["Config"]["Labels"].get(tool.SERVICE) == service
            and stack.LAUNCHED not in each["Config"]["Labels"]
        )

    def inside(self, service: str, *command: str) -> str:
        """Run a command in a service's container; its output."""
        return self.tool.engine("exec", self.container(service)["Name"].lstrip("/"), *command)


def until(true: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """What ``true`` gives once it is true; waits for it."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def compose() -> Tool:
    """Compose for a project of its own; skipped, with the reason, where no engine can run it."""
    reason = tool.missing()
    if reason:
        pytest.skip(f"no containers here: {reason}")
    gateway, grpc, prometheus = free_ports(3)
    found = tool.find(
        {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"tidegate-test-{uuid.uuid4().hex[:6]}",
            "TIDEGATE_GATEWAY_PORT": str(gateway),
            "TIDEGATE_GATEWAY_GRPC_PORT": str(grpc),
            "TIDEGATE_PROMETHEUS_PORT": str(prometheus),
        }
    )
    listed = found.engine("images", "--format", "{{.Repository}}:{{.Tag}}").split()
    absent = images.absent(found.environ, set(listed))
    if absent and not MAY_FETCH:
        pytest.skip(f"the engine lacks {', '.join(absent)}: COMPOSE_TEST_FETCH=1 lets it fetch them")
    return found


@pytest.fixture(scope="session")
def world(compose: Tool) -> Iterator[World]:
    """The stack, built and up. What is left of it at the end is taken away, whatever the tests met."""
    began = time.monotonic()
    try:
        stack.up(compose)
        gateway = compose.environ["TIDEGATE_GATEWAY_PORT"]
        prometheus = compose.environ["TIDEGATE_PROMETHEUS_PORT"]
        found = World(compose, "", int(gateway), int(prometheus), 0.0)
        key = stack.gateway_token(compose, found.container("gateway")["Name"].lstrip("/"))
        yield World(compose, key, int(gateway), int(prometheus), time.monotonic() - began)
    finally:
        if not KEEP:
            stack.down(compose, volumes=True)


@pytest.fixture(scope="session")
def identity() -> Path:
    """A model that answers what it is asked."""
    return Path(__file__).resolve().parents[2] / "examples" / "python-model" / "identity"
