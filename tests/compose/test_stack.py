"""Tidegate in containers: from nothing to the first right answer, losses, scale, and back to nothing.

The tests share one stack and run in this order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest

from deploy.compose import stack, tool
from tests.compose.conftest import KEEP, until
from tests.conftest import PATIENCE_S, Figure
from tidegate.kernel.errors import TidegateError

DEPLOYMENT = "identity-v1"
UNREACHABLE = r"gaierror|timed out|refused"


class Traffic:
    """Requests one after the other, each answer checked, while a block runs."""

    def __init__(self, world) -> None:
        self._world = world
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answered = 0
        self.wrong: list[str] = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(timeout=90)

    def _run(self) -> None:
        with self._world.client() as client:
            while not self._stop.is_set():
                sent = np.full((1, 16), float(self.answered), dtype=np.float32)
                try:
                    got = client.infer("identity", {"x": sent}, timeout_s=60)
                except TidegateError as error:
                    self.wrong.append(f"{error.reason}: {error.message}")
                else:
                    self.wrong += [] if np.array_equal(got["y"], sent) else ["another answer"]
                    self.answered += 1
                time.sleep(0.01)


def settled(world, count: int):
    """The workers, once there are ``count`` that are ready and none comes or goes."""

    def look():
        status, workers = world.status(DEPLOYMENT), world.workers(DEPLOYMENT)
        calm = status["ready"] == count and not status["starting"] and not status["draining"]
        return workers if calm and len(workers) == count else None

    return until(look, f"{count} workers")


def command_line(world, state, *arguments):
    """Run `tidegate` with what `make compose-up` hands over."""
    environment = {
        **os.environ,
        "TIDEGATE_GATEWAY_URL": world.url,
        "TIDEGATE_API_KEY": world.key,
        "TIDEGATE_STATE_DIR": str(state),
    }
    command = [sys.executable, "-m", "tidegate.cli", *arguments]
    return subprocess.run(
        command, env=environment, cwd=tool.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_example_trained_deployed_and_answered_inside(world, figure: Figure):
    stack.example(world.tool)
    figure(f"from nothing to a stack that is well: {world.took_s:.1f} s")


def test_the_first_right_answer_from_outside(world, identity, tmp_path, figure: Figure):
    """With the command line of this machine, everything through the gateway."""
    began = time.monotonic()
    order = ["deploy", str(identity), "--signature", str(identity / "signature.json"), "--name", "identity"]
    done = command_line(world, tmp_path, *order, "--min", "1", "--max", "4", "--resource", "memory_mb=1024")
    assert done.returncode == 0, done.stdout
    sent = np.arange(16, dtype=np.float32).reshape(1, 16)
    with world.client() as client:
        got = client.infer("identity", {"x": sent}, timeout_s=60)
    assert np.array_equal(got["y"], sent)
    figure(f"from a file to the first right answer: {time.monotonic() - began:.1f} s")
    assert list(world.workers(DEPLOYMENT)) == [f"{DEPLOYMENT}-0-1"]


def test_nobody_without_a_key_is_let_in(world):
    answer = httpx.post(f"{world.url}/v2/models/identity/infer", json={"inputs": []}, trust_env=False)
    assert answer.status_code == 401


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(world, figure: Figure):
    (before,) = settled(world, 1).values()
    with Traffic(world) as traffic:
        until(lambda: traffic.answered > 20, "traffic")
        killed = time.monotonic()
        world.tool.engine("kill", before)
        (after,) = until(lambda: set(world.workers(DEPLOYMENT).values()) - {before}, "another container")
        answered = traffic.answered
        until(lambda: traffic.answered > answered + 20, "traffic again")
    figure(f"a killed container is replaced and answers after {time.monotonic() - killed:.1f} s")
    assert traffic.wrong == []
    assert after == f"{world.tool.project}.{DEPLOYMENT}-0-2"


def test_scale_up_and_down_by_the_api(world, figure: Figure):
    with Traffic(world) as traffic:
        for count in (3, 1):
            began = time.monotonic()
            path = f"/api/autoscaler/v1/deployments/{DEPLOYMENT}/replicas"
            world.ask("PUT", path, {"replicas": count})
            workers = sorted(settled(world, count))
            figure(f"{count} workers after {time.monotonic() - began:.1f} s: {workers}")
        world.ask("DELETE", path)
    assert traffic.wrong == []
    assert traffic.answered > 0


def test_a_model_that_is_too_large_for_its_memory_is_told_so(world, identity, tmp_path):
    """And leaves its neighbours alone."""
    greedy = (
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n"
        "        self.hoard = [b'x' * 2**20 for _ in range(8192)]\n"
    )
    folder = tmp_path / "greedy"
    folder.mkdir()
    (folder / "model.py").write_text(greedy)
    order = ["deploy", str(folder), "--signature", str(identity / "signature.json"), "--name", "greedy"]
    done = command_line(world, tmp_path, *order, "--resource", "memory_mb=768")
    assert done.returncode != 0
    assert "out of memory" in done.stdout
    (name,) = world.workers(DEPLOYMENT).values()
    assert world.tool.engine("inspect", "-f", "{{.State.Running}}", name).strip() == "true"
    assert command_line(world, tmp_path, "delete", "greedy", "--yes").returncode == 0


def test_up_again_leaves_the_workers_alone(world):
    def ids():
        return {
            name: world.tool.engine("inspect", "-f", "{{.Id}}", name) for name in world.workers().values()
        }

    before = ids()
    stack.up(world.tool, build=False)
    assert ids() == before


def test_an_autoscaler_that_is_killed_adopts_what_runs(world):
    path = f"/api/autoscaler/v1/deployments/{DEPLOYMENT}/replicas"
    world.ask("PUT", path, {"replicas": 2})
    before = settled(world, 2)
    name = world.container("autoscaler")["Name"].lstrip("/")
    world.tool.engine("kill", name)
    with world.client() as client:
        sent = np.ones((1, 16), dtype=np.float32)
        assert np.array_equal(client.infer("identity", {"x": sent})["y"], sent)
    world.tool.engine("start", name)
    until(lambda: stack.states([world.container("autoscaler")])[0][1] == "healthy", "the autoscaler is back")
    assert settled(world, 2) == before, "the same containers: none lost, none doubled"
    world.ask("PUT", path, {"replicas": 1})
    settled(world, 1)
    world.ask("DELETE", path)


def test_prometheus_finds_the_services_and_the_workers(world):
    def found():
        answer = httpx.get(f"{world.prometheus}/api/v1/targets", trust_env=False).json()
        active = answer["data"]["activeTargets"]
        return sorted(
            (each["labels"]["job"], each["labels"].get("replica", each["labels"]["instance"]), each["health"])
            for each in active
            if each["labels"]["job"] != "rabbitmq"
        )

    def expected():
        replicas = (("workers", replica, "up") for replica in world.workers(""))
        ports = {"gateway": 8000, "registry": 8010, "router": 8020, "autoscaler": 8030}
        return sorted([*replicas, *((name, f"{name}:{port}", "up") for name, port in ports.items())])

    deadline = time.monotonic() + PATIENCE_S
    while found() != expected():
        assert time.monotonic() < deadline, f"{found()} and not {expected()}"
        time.sleep(0.5)


def test_images_are_small_in_rights(world):
    """No root, no build tools; a healthcheck for all that stays."""
    for service in ("gateway", "worker"):
        image = world.container(service)["Config"]["Image"]
        user = json.loads(world.tool.engine("inspect", image))[0]["Config"]["User"]
        assert user == "10001:10001"
        found = world.tool.engine(
            "run", "--rm", "--entrypoint", "sh", image, "-c",
            "for tool in gcc cc g++ make ld cmake cargo; do command -v $tool; done; true",
        )  # fmt: skip
        assert found == ""
    for container in world.tool.containers():
        labels = container["Config"]["Labels"]
        if labels[tool.SERVICE] in stack.ONCE and stack.LAUNCHED not in labels:
            continue
        assert container["State"]["Health"]["Status"] == "healthy", container["Name"]


def test_only_the_proxy_has_the_engines_socket(world):
    holders = {
        each["Config"]["Labels"][tool.SERVICE]
        for each in world.tool.containers()
        if any("docker.sock" in mount["Source"] for mount in each["Mounts"])
    }
    assert holders == {"engine-proxy"}
    escape = {
        "Image": "tidegate/worker:latest",
        "HostConfig": {"Binds": ["/:/host"], "Privileged": True},
    }
    script = (
        "import httpx, json, sys; "
        "print(httpx.post('http://engine-proxy:2375/containers/create?name=x', "
        f"json=json.loads('{json.dumps(escape)}')).status_code)"
    )
    assert world.inside("autoscaler", "python", "-c", script).strip() == "403"
    cut_off = "import socket; socket.create_connection(('engine-proxy', 2375), 3)"
    with pytest.raises(tool.ComposeFailed, match=UNREACHABLE):
        world.inside("gateway", "python", "-c", cut_off)


def test_workers_do_not_reach_the_database(world):
    (name,) = world.workers(DEPLOYMENT).values()
    cut_off = "import socket; socket.create_connection(('postgres', 5432), 3)"
    with pytest.raises(tool.ComposeFailed, match=UNREACHABLE):
        world.tool.engine("exec", name, "python", "-c", cut_off)


@pytest.mark.skipif(KEEP, reason="COMPOSE_TEST_KEEP: the stack is to stay")
def test_down_takes_everything_away(world, figure: Figure):
    began = time.monotonic()
    stack.down(world.tool, volumes=True)
    figure(f"down in {time.monotonic() - began:.1f} s")
    mine = f"label={tool.PROJECT}={world.tool.project}"
    assert world.tool.engine("ps", "-aq", "--filter", mine) == ""
    assert world.tool.engine("ps", "-aq", "--filter", f"label=tidegate.stack={world.tool.project}") == ""
    assert world.tool.engine("network", "ls", "-q", "--filter", mine) == ""
    volumes = world.tool.engine("volume", "ls", "-q", "--filter", mine)
    named = world.tool.engine("volume", "ls", "-q", "--filter", f"name={world.tool.project}_")
    assert (volumes, named) == ("", "")
