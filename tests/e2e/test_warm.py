"""A stack with a warm pool: the models' cold starts without the start of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.conftest import PATIENCE_S, Figure
from tests.e2e.conftest import REPO, Stack, running_stack
from tests.e2e.test_resilience import wait_until
from tests.e2e.test_scale import PHASES, wait_replicas
from tidegate import Client

SOURCE = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        told = float(os.environ["TOLD"]) + 10 * float(os.environ["OMP_NUM_THREADS"])
        return [self._answer(request, told) for request in requests]

    def _answer(self, request, told):
        rows = len(pb_utils.get_input_tensor_by_name(request, "x").as_numpy())
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.full((rows, 16), told, np.float32))])
"""
SIGNATURE = REPO / "examples" / "python-model" / "identity" / "signature.json"
ONE = np.ones((1, 16), np.float32)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with one worker that waits, and nothing deployed."""
    with running_stack(tmp_path_factory.mktemp("warm") / "state", autoscaler_warm='{"cpu": 1}') as found:
        yield found


@pytest.fixture
def client(warm: Stack) -> Iterator[Client]:
    with Client(warm.settings.gateway_url, timeout_s=60) as made:
        yield made


def waiting(stack: Stack) -> list[str]:
    (pool,) = stack.autoscaler("/v1/warm")["items"]
    assert pool["problem"] == ""
    return list(pool["ready"])


def answers(stack: Stack) -> bool:
    """Whether the autoscaler does."""
    try:
        stack.autoscaler("/v1/warm")
    except httpx.HTTPError:
        return False
    return True


def running() -> set[int]:
    """The processes that have not ended."""
    found = psutil.process_iter(["pid", "status"])
    return {each.info["pid"] for each in found if each.info["status"] != psutil.STATUS_ZOMBIE}


def test_a_model_wakes_in_a_worker_that_waited(warm: Stack, client: Client, figure: Figure) -> None:
    example = REPO / "examples" / "python-model" / "identity" / "model.py"
    options = ("--signature", str(SIGNATURE), "--min", "0", "--max", "1", "--scale-to-zero-after", "1")
    wait_until("a worker waits", lambda: waiting(warm))
    warm.deploy(example, "sleeper", *options)
    wait_replicas(warm, "sleeper-v1", 0)
    wait_until("another one waits", lambda: waiting(warm))
    (worker,) = waiting(warm)
    warm.cli(
        "policy", "sleeper", "--set", "scale_to_zero_after_s=600"
    )  # so that it does not sleep before the test has looked at it
    assert (client.infer("sleeper", {"x": ONE})["y"] == ONE).all()

    start = warm.cli("cold-starts", "sleeper-v1")["items"][0]
    assert start["warm"]
    assert start["phases_ms"].keys() == PHASES
    parts = ", ".join(f"{name} {value:.0f} ms" for name, value in start["phases_ms"].items())
    figure(f"cold start in a worker that waited: {parts}")
    (replica,) = warm.replicas("sleeper-v1")
    assert replica["worker"] == worker
    assert "waiting for a model" in warm.run("logs", replica["replica"]).stdout


def test_an_env_and_threads_of_its_own_count_there_too(warm: Stack, client: Client, tmp_path: Path) -> None:
    wait_until("a worker waits", lambda: waiting(warm))
    path = tmp_path / "model.py"
    path.write_text(SOURCE)
    warm.deploy(path, "told", "--signature", str(SIGNATURE), "--env", "TOLD=7", "--threads", "2")
    (replica,) = warm.replicas("told-v1")
    assert replica["worker"].startswith("warm-cpu--0-")
    assert client.infer("told", {"x": ONE})["y"][0, 0] == 27


def test_killed_the_next_one_that_waits_takes_over(warm: Stack, client: Client) -> None:
    wait_until("a worker waits", lambda: waiting(warm))
    (before,) = warm.replicas("told-v1")
    psutil.Process(before["pid"]).kill()
    assert client.infer("told", {"x": ONE})["y"][0, 0] == 27
    wait_replicas(warm, "told-v1", 1)
    (after,) = warm.replicas("told-v1")
    assert after["worker"] not in ("", before["worker"])


def test_an_autoscaler_killed_knows_afterwards_who_is_who(warm: Stack, client: Client) -> None:
    wait_until("a worker waits", lambda: waiting(warm))
    before, idle = warm.replicas("told-v1"), waiting(warm)
    old = warm.child("autoscaler")
    old.kill()
    old.wait(PATIENCE_S)
    wait_until("it is there again", lambda: answers(warm))
    assert warm.run("warm").returncode == 0
    wait_until("the worker waits", lambda: waiting(warm))
    after = warm.replicas("told-v1")
    assert [(r["replica"], r["worker"], r["pid"]) for r in after] == [
        (r["replica"], r["worker"], r["pid"]) for r in before
    ]
    assert waiting(warm) == idle
    warm.cli("delete", "told", "--yes")
    wait_replicas(warm, "told-v1", 0)
    wait_until("the worker is gone", lambda: before[0]["pid"] not in running())
