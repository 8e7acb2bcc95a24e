"""A harness that runs workers as containers of the local engine, from an image with Python."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import requests
import uvicorn
from docker.errors import DockerException, NotFound

from services.autoscaler.adapters.docker.container_spec import DockerPlan
from services.autoscaler.adapters.docker.engine import Engine
from services.autoscaler.adapters.docker.launcher import DockerLauncher
from services.autoscaler.api.engine_proxy import EngineProxy
from services.autoscaler.domain.engine_rules import StackBounds
from services.autoscaler.domain.gpus import Gpu
from tests.integration.autoscaler.worker_script import WORKER

URL = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
# The first one that the engine has is used; none is pulled. Any image with a `python3` works.
IMAGES = ("python:3.11-slim-bookworm", "python:3.11-slim", "standin/python:3.11-slim")
HOME = "/tmp"
TOKEN = "the-proxy's"


@functools.cache
def missing() -> str:
    """Return why no containers can run here; empty if they can."""
    try:
        api().ping()
    except (DockerException, requests.RequestException, OSError):
        return f"no container engine answers at {URL}"
    return "" if image() else f"the engine has none of the images {', '.join(IMAGES)}: name one by TEST_IMAGE"


@functools.cache
def api() -> Any:
    return docker.APIClient(URL, version="auto", timeout=60)


@functools.cache
def image() -> str:
    wanted = (os.environ["TEST_IMAGE"],) if os.environ.get("TEST_IMAGE") else IMAGES
    have = {tag for each in api().images() for tag in each["RepoTags"] or ()}
    return next((name for name in wanted if name in have), "")


class InjectedGpus:
    """A list of GPUs that a test sets, because test machines have none."""

    def __init__(self, *gpus: Gpu) -> None:
        self._gpus = gpus

    async def gpus(self) -> tuple[Gpu, ...]:
        return self._gpus


class ContainerHarness:
    """A stack of containers with launchers. Everything that was started ends with the test."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.stack = f"tidegate-test-{uuid.uuid4().hex[:8]}"
        self.url = URL
        self._engines: list[Engine] = []
        self._others: list[ContainerHarness] = []

    @contextmanager
    def behind_proxy(self) -> Iterator[None]:
        """Run a proxy, and let the launchers of this harness call the engine through it."""
        bounds = StackBounds(self.stack, (image(),), "none", home=HOME)
        app = EngineProxy(bounds, URL.removeprefix("unix://"), TOKEN)
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
            thread = threading.Thread(target=server.run, args=([door],))
            thread.start()
            self.url = f"tcp://127.0.0.1:{door.getsockname()[1]}"
            try:
                self.until(lambda: server.started, "the proxy is up")
                yield
            finally:
                self.url = URL
                server.should_exit = True
                thread.join()

    def plan(self, mode: str = "", **given: Any) -> DockerPlan:
        """Return the plan for workers of this harness."""
        usual: dict[str, Any] = {
            "stack": self.stack,
            "image": image(),
            "network": "none",
            "state_dir": self.state,
            "token": "the-token",
            "environment": {"MODE": mode},
            "home": HOME,
            "command": ["python3", "-S", "-c", WORKER, f"{HOME}/replica"],
            "pull": "never",
            "gpu_request": "environment",
        }
        return DockerPlan(**{**usual, **given})

    def launcher(
        self, mode: str = "", late_s: float = 0.0, gpus: Sequence[Gpu] = (), **given: Any
    ) -> DockerLauncher:
        """Return a new launcher, as after a restart. Its clock is ``late_s`` seconds ahead."""
        self._engines.append(Engine(self.url, TOKEN))
        return DockerLauncher(
            self.plan(mode, **given), self._engines[-1], InjectedGpus(*gpus), lambda: time.time() + late_s
        )

    def other(self) -> ContainerHarness:
        """Return a harness of another stack on the same engine, without a proxy."""
        self._others.append(ContainerHarness(self.state / "other"))
        return self._others[-1]

    def name(self, replica: str) -> str:
        return f"{self.stack}.{replica}"

    def inspect(self, replica: str) -> dict[str, Any]:
        found: dict[str, Any] = api().inspect_container(self.name(replica))
        return found

    def alive(self, replica: str) -> int:
        """Return the number of processes of the replica."""
        try:
            running = self.inspect(replica)["State"]["Running"]
            return len(api().top(self.name(replica))["Processes"]) if running else 0
        except (NotFound, docker.errors.APIError):
            return 0

    def crash(self, replica: str) -> None:
        """Kill the worker process."""
        command = ["sh", "-c", f"kill -9 $(cat {HOME}/replica/lock)"]
        api().exec_start(api().exec_create(self.name(replica), command)["Id"])
        self.until(lambda: not self.inspect(replica)["State"]["Running"], "the worker is dead")

    def cut_off(self, replica: str) -> None:
        """Create what an interrupted launch leaves, before it started a process."""
        labels = {"tidegate.stack": self.stack, "tidegate.replica": replica}
        body = {"Image": image(), "Labels": labels, "HostConfig": {"NetworkMode": "none"}}
        api().create_container_from_config(body, self.name(replica))

    def output(self, replica: str) -> str:
        """Return the output of the worker, even after its end."""
        kept = self.state / "log" / f"worker-{replica}.log"
        if kept.exists():
            return kept.read_text()
        said: bytes = api().logs(self.name(replica))
        return said.decode()

    def left(self) -> list[str]:
        """Return the replicas that have left anything."""
        return sorted(each["Names"][0].lstrip("/") for each in self._mine())

    def until(self, true: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
            time.sleep(0.05)

    def until_up(self, *replicas: str) -> None:
        """Wait until the workers have their lock and their child process."""
        for replica in replicas:
            self.until(functools.partial(self._is_up, replica), f"{replica} is up")

    def _is_up(self, replica: str) -> bool:
        return "up" in self.output(replica)

    def clear(self) -> None:
        for other in self._others:
            other.clear()
        for each in self._mine():
            api().remove_container(each["Id"], force=True, v=True)
        for engine in self._engines:
            engine.close()

    def _mine(self) -> list[dict[str, Any]]:
        wanted = {"label": f"tidegate.stack={self.stack}"}
        found: list[dict[str, Any]] = api().containers(all=True, filters=wanted)
        return found
