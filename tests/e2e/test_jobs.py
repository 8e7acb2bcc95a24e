"""Jobs as their callers see them: over HTTP, by the SDK and on the command line, with the gateway killed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tests.e2e.conftest import Digits, Stack
from tidegate import Client
from tidegate.kernel.errors import Conflict, ModelFailed

pytestmark = pytest.mark.e2e

PATIENCE_S = 120.0
ANY_SIZE = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())]
            )
            for r in requests
        ]
"""
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def http(stack: Stack) -> Iterator[httpx.Client]:
    """A caller without a credential, on loopback."""
    with httpx.Client(base_url=stack.settings.gateway_url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def sleeper(deploy_python: Callable[..., str]) -> str:
    """One worker that runs one call at a time."""
    return deploy_python("sleep", "jobs-sleeper", "--max-batch", "1", "--min", "1", "--max", "1")


def ms(value: float) -> dict[str, Any]:
    return {"inputs": [{"name": "ms", "datatype": "FP32", "shape": [1, 1], "data": [value]}]}


def image(digits: Digits, at: int) -> dict[str, Any]:
    data = digits.images[at].ravel().tolist()
    return {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, len(data)], "data": data}]}


def test_a_job_is_followed_to_its_result(http: httpx.Client, served: str, digits: Digits):
    answer = http.post(f"/v2/models/{served}/infer", json=image(digits, 0), headers=ASYNC)
    assert answer.status_code == 202
    job = answer.json()
    events = http.get(job["urls"]["events"]).text
    assert [line for line in events.splitlines() if line.startswith("event: ")][-1] == "event: succeeded"
    done = http.get(answer.headers["location"]).json()
    assert (done["status"], done["attempts"]) == ("succeeded", 1)
    assert done["worker"].startswith("digits-v1-")
    assert done["timing"]["compute_ms"] > 0
    result = http.get(job["urls"]["result"]).json()
    (label,) = [o["data"][0] for o in result["outputs"] if o["name"] == "label"]
    assert label == int(np.argmax(digits.probabilities[0]))
    at_once = http.post(f"/v2/models/{served}/infer", json=image(digits, 0))
    assert result["outputs"] == at_once.json()["outputs"]


def test_one_call_serves_both_kinds_of_caller(http: httpx.Client, sleeper: str):
    quick = http.post(f"/v2/models/{sleeper}/infer", json=ms(10), headers={"Prefer": "wait=100"})
    assert quick.status_code == 200
    assert quick.json()["outputs"][0]["data"] == [10]
    slow = http.post(f"/v2/models/{sleeper}/infer", json=ms(2500), headers={"Prefer": "wait=1"})
    assert slow.status_code == 202
    job = http.get(slow.headers["location"], headers={"Prefer": "wait=100"}).json()
    assert job["status"] == "succeeded"


def test_positions_and_estimates_of_a_queue(http: httpx.Client, sleeper: str):
    for _ in range(3):  # so that the model's time is known
        http.post(f"/v2/models/{sleeper}/infer", json=ms(100))
    for first_ms in (2_000, 15_000, 60_000):  # a busy machine needs longer to submit and to ask
        sizes = (first_ms, *[300] * 5)
        jobs = [http.post(f"/v2/models/{sleeper}/infer", json=ms(n), headers=ASYNC).json() for n in sizes]
        positions = [http.get(job["urls"]["status"]).json()["position"] for job in jobs]
        if http.get(jobs[0]["urls"]["status"]).json()["status"] in ("queued", "running"):
            break
        for job in jobs:
            http.delete(job["urls"]["cancel"])
    waiting = [position for position in positions if position is not None]
    assert waiting == sorted(waiting)
    assert len(waiting) >= 2
    last = http.get(jobs[-1]["urls"]["status"]).json()
    assert last["estimated_start"] is None or last["estimated_start"] > last["created_at"]
    for job in jobs:
        http.delete(job["urls"]["cancel"])


def test_the_sdk_submits_cancels_and_retries(client: Client, sleeper: str):
    first = client.submit(
        sleeper, {"ms": np.array([[2000]], np.float32)}, priority="high", metadata={"run": 7}
    )
    second = client.submit(sleeper, {"ms": np.array([[30_000]], np.float32)})
    assert client.job(first.id).document["metadata"] == {"run": 7}
    assert second.cancel() == "cancelled"
    with pytest.raises(Conflict, match="cancelled"):
        second.result()
    assert first.result(PATIENCE_S)["slept"].tolist() == [[2000]]
    wrong = client.submit(sleeper, {"ms": np.array([[-1]], np.float32)})
    with pytest.raises(ModelFailed, match="at least 0"):
        wrong.result(PATIENCE_S)
    again = wrong.retry()
    assert again.id != wrong.id
    assert again.wait(PATIENCE_S) == "failed"


def test_a_large_job_travels_by_the_blob_store(stack: Stack, client: Client, tmp_path: Path):
    """Request and result are above the limit of a message."""
    (tmp_path / "model.py").write_text(ANY_SIZE)
    signature = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
        "max_batch_size": 0,
    }
    (tmp_path / "signature.json").write_text(json.dumps(signature))
    stack.deploy(tmp_path / "model.py", "jobs-any-size", "--signature", str(tmp_path / "signature.json"))
    x = np.random.default_rng(1).random(3 * 2**20, np.float32)
    job = client.submit("jobs-any-size", x)
    assert np.array_equal(job.result(PATIENCE_S)["y"], x)
    assert job.wait() == "succeeded"
    assert job.document["result_bytes"] < 1000  # the record has a claim


def test_the_command_line(stack: Stack, client: Client, sleeper: str):
    job = client.submit(sleeper, {"ms": np.array([[20]], np.float32)})
    found = stack.cli("job", job.id, "--wait")
    assert (found["status"], found["endpoint"]) == ("succeeded", sleeper)
    assert stack.cli("job", job.id, "--result")["outputs"][0]["data"] == [20]
    listed = stack.cli("jobs", "--endpoint", sleeper, "--status", "succeeded")["items"]
    assert job.id in [item["id"] for item in listed]


def test_a_key_outlives_the_gateway(stack: Stack, http: httpx.Client, sleeper: str):
    """A gateway is killed while its callers submit: asked again with their keys, each has one job."""
    bodies = [ms(1 + n / 1000) for n in range(300)]
    keys = [f"outlives-{time.time_ns()}-{n}" for n in range(300)]
    seen: dict[str, set[str]] = {key: set() for key in keys}
    gateway = stack.child("gateway")
    for round_ in range(2):
        for n, (key, body) in enumerate(zip(keys, bodies, strict=True)):
            if round_ == 0 and n == 150:
                gateway.kill()
            seen[key].add(submit_until_taken(http, sleeper, body, key))
    assert all(len(ids) == 1 for ids in seen.values())
    for (id_,), body in zip(seen.values(), bodies, strict=True):
        done = http.get(f"/v1/jobs/{id_}", headers={"Prefer": "wait=60"}).json()
        assert done["status"] == "succeeded", done
        (output,) = http.get(f"/v1/jobs/{id_}/result").json()["outputs"]
        assert np.float32(output["data"][0]) == np.float32(body["inputs"][0]["data"][0])


def submit_until_taken(http: httpx.Client, model: str, body: dict[str, Any], key: str) -> str:
    """The job's id; asks again while nobody answers, as a caller would."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            headers = ASYNC | {"Idempotency-Key": key}
            answer = http.post(f"/v2/models/{model}/infer", json=body, headers=headers)
            if answer.status_code == 202:
                return str(answer.json()["id"])
            assert answer.status_code in {404, 503}, answer.text  # its route table may not be there yet
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.1)


def test_an_event_stream_resumes_at_another_gateway(stack: Stack, http: httpx.Client, sleeper: str):
    job = http.post(f"/v2/models/{sleeper}/infer", json=ms(8000), headers=ASYNC).json()
    seen: list[int] = []
    with suppress(httpx.TransportError), http.stream("GET", job["urls"]["events"]) as stream:
        for line in stream.iter_lines():
            if line.startswith("id: "):
                seen.append(int(line.removeprefix("id: ")))
            if line == "event: running":
                stack.child("gateway").kill()
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            rest = http.get(job["urls"]["events"], headers={"Last-Event-ID": str(seen[-1])})
            break
        except httpx.TransportError:
            assert time.monotonic() < end
            time.sleep(0.1)
    numbers = [int(line.removeprefix("id: ")) for line in rest.text.splitlines() if line.startswith("id: ")]
    assert numbers, "the stream ended before the gateway did"
    assert [seen[-1], *numbers] == sorted({seen[-1], *numbers})
    datas = [line.removeprefix("data: ") for line in rest.text.splitlines() if line.startswith("data: ")]
    assert json.loads(datas[-1])["status"] == "succeeded"


def test_of_somebody_else(stack: Stack, http: httpx.Client, sleeper: str):
    """The service token sees all jobs, a caller without a credential those without."""
    token = {"Authorization": f"Bearer {stack.settings.service_token}"}
    body = orjson.dumps(ms(1) | {"model": sleeper})
    theirs = http.post("/v1/jobs", content=body, headers=token).json()
    mine = http.post("/v1/jobs", content=body).json()
    assert (theirs["principal"], mine["principal"]) == ("service", "anonymous")
    for path in ("status", "result", "events"):
        assert http.get(theirs["urls"][path]).status_code == 404
    assert http.get(mine["urls"]["status"], headers=token).status_code == 200
    ids = [item["id"] for item in http.get("/v1/jobs", params={"limit": 10}).json()["items"]]
    assert mine["id"] in ids
    assert theirs["id"] not in ids
