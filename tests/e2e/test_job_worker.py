"""Jobs at real workers: killed, made to wait, longer than the broker is patient."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.e2e.conftest import REPO, Stack, running_stack
from tidegate import Client
from tidegate.client.sync import JobHandle

ACK_TIMEOUT_S = 3.0
LONG_S = 15.0
PATIENCE_S = 120.0
# As a model looks that can be cancelled: what Triton is told, it must look for.
CANCELLABLE = """
import time
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        ms = pb_utils.get_input_tensor_by_name(request, "ms").as_numpy()
        end = time.monotonic() + float(ms.max()) / 1000
        while time.monotonic() < end:
            if request.is_cancelled():
                error = pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED)
                return pb_utils.InferenceResponse(error=error)
            time.sleep(0.01)
        return pb_utils.InferenceResponse([pb_utils.Tensor("slept", ms)])
"""
PARAMETERS = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("said", np.array([[request.parameters()]], dtype=object))]
            )
            for request in requests
        ]
"""


def ms(value: float) -> dict[str, np.ndarray]:
    return {"ms": np.array([[value]], "<f4")}


@pytest.fixture(scope="module")
def sleeper(deploy_python: Callable[..., str]) -> str:
    """One worker that runs one call at a time."""
    return deploy_python("sleep", "job-sleeper", "--max-batch", "1", "--min", "1", "--max", "1")


def ends_right(job: JobHandle, value: float) -> dict[str, Any]:
    """Its document, after it has ended with the right result."""
    assert job.wait(PATIENCE_S) == "succeeded", job.document
    assert job.result(PATIENCE_S)["slept"].tolist() == [[value]]
    return job.document


def some_jobs(client: Client, sleeper: str) -> list[tuple[JobHandle, float]]:
    """Jobs and their right results; one has ended, one of a while is running, the others wait."""
    values = [100.0, 6000.0, *(100.0 + n for n in range(8))]
    jobs = [(client.submit(sleeper, ms(value)), value) for value in values]
    while jobs[1][0].status() == "queued":
        time.sleep(0.01)
    return jobs


def test_the_model_is_told_which_job_it_runs(stack: Stack, client: Client, tmp_path: Path):
    (tmp_path / "model.py").write_text(PARAMETERS)
    signature = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
        "outputs": [{"name": "said", "datatype": "BYTES", "shape": [1]}],
        "max_batch_size": 1,
    }
    (tmp_path / "signature.json").write_text(json.dumps(signature))
    stack.deploy(tmp_path / "model.py", "job-told", "--signature", str(tmp_path / "signature.json"))
    job = client.submit("job-told", {"x": np.zeros((1, 1), "<f4")})
    said = json.loads(job.result(PATIENCE_S)["said"].tolist()[0][0])
    assert said["tidegate_jobs"] == f"{job.id}:1:1"


def test_a_worker_is_killed_under_its_jobs(stack: Stack, client: Client, sleeper: str):
    worker = stack.worker("job-sleeper-v1")
    jobs = some_jobs(client, sleeper)
    worker.kill()
    documents = [ends_right(job, value) for job, value in jobs]
    attempts = [document["attempts"] for document in documents]
    assert max(attempts) == 2, attempts
    assert {document["worker"] for document in documents if document["attempts"] == 2} != {
        documents[0]["worker"]
    }


def test_triton_is_killed_under_its_jobs(stack: Stack, client: Client, sleeper: str):
    worker = stack.worker("job-sleeper-v1")
    (triton,) = [p for p in worker.children() if p.name() == "tritonserver"]
    jobs = some_jobs(client, sleeper)
    triton.kill()
    attempts = [ends_right(job, value)["attempts"] for job, value in jobs]
    assert max(attempts) == 2, attempts
    assert worker.is_running()


def test_more_urgent_jobs_go_first(client: Client, sleeper: str):
    """While one runs others gather: 6 that can wait, then 6 that are urgent."""
    for running_ms in (4000.0, 20_000.0, 60_000.0):  # a slow machine needs longer to submit the others
        first = client.submit(sleeper, ms(running_ms))
        while first.status() == "queued":
            time.sleep(0.01)
        low = [client.submit(sleeper, ms(20.0), priority="low") for _ in range(6)]
        # They take longer than the worker needs to fetch the next one, also on a busy machine. If it has none
        # at hand, it runs one that can wait.
        high = [client.submit(sleeper, ms(500.0), priority="high") for _ in range(6)]
        if first.status() == "running":
            break
    assert {job.wait(PATIENCE_S) for job in [first, *low, *high]} == {"succeeded"}
    ends = {job.id: job.document["finished_at"] for job in [*low, *high]}
    order = sorted(ends, key=lambda id_: ends[id_])
    assert len({job.id for job in high} & set(order[:7])) == 6, "one that could wait may have been before"


def test_a_running_job_is_cancelled_in_the_model_server(stack: Stack, client: Client, tmp_path: Path):
    (tmp_path / "model.py").write_text(CANCELLABLE)
    signature = REPO / "examples" / "python-model" / "sleep" / "signature.json"
    stack.deploy(tmp_path / "model.py", "job-cancelled", "--signature", str(signature), "--max-batch", "1")
    job = client.submit("job-cancelled", ms(600_000.0))
    while job.status() == "queued":
        time.sleep(0.01)
    assert job.cancel() == "cancelled"
    assert job.document["attempts"] == 1
    # There is one instance, and it would be at the job for ten minutes.
    assert client.infer("job-cancelled", ms(1.0))["slept"].tolist() == [[1.0]]


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose broker closes the channel of who holds a message for too long, and looks often."""
    state = tmp_path_factory.mktemp("impatient") / "state"
    (state / "data" / "rabbitmq").mkdir(parents=True)
    config = state / "data" / "rabbitmq" / "advanced.config"
    config.write_text("[{rabbit, [{channel_tick_interval, 1000}]}].\n")
    with running_stack(state, ack_timeout_s=ACK_TIMEOUT_S) as found:
        yield found


def test_a_job_longer_than_the_ack_timeout(impatient: Stack):
    folder = REPO / "examples" / "python-model" / "sleep"
    impatient.deploy(folder / "model.py", "long", "--signature", str(folder / "signature.json"))
    worker: psutil.Process = impatient.worker("long-v1")
    with Client(impatient.settings.gateway_url, timeout_s=60) as client:
        job = client.submit("long", ms(LONG_S * 1e3))
        document = ends_right(job, LONG_S * 1e3)
    assert document["attempts"] == 1
    assert document["timing"]["compute_ms"] >= LONG_S * 1e3
    assert worker.is_running()
