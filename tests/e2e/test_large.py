"""Payloads larger than a message, through the whole stack: equal bit for bit, or refused; never lost."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.conftest import PATIENCE_S
from tests.e2e.conftest import Stack

pytestmark = pytest.mark.e2e

MIB = 2**20
MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
        pause = pb_utils.get_input_tensor_by_name(request, "pause").as_numpy()
        time.sleep(float(pause.ravel()[0]))
        first = np.ascontiguousarray(x[..., :1])
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x), pb_utils.Tensor("first", first)])
"""
SIGNATURE = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1]},
        {"name": "pause", "datatype": "FP32", "shape": [1]},
    ],
    "outputs": [
        {"name": "y", "datatype": "FP32", "shape": [-1]},
        {"name": "first", "datatype": "FP32", "shape": [1]},
    ],
    "max_batch_size": 4,
}


@pytest.fixture(scope="module")
def echo(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that gives back what it gets, of any size; ``pause`` is how long it takes, in seconds."""
    folder = tmp_path_factory.mktemp("echo")
    (folder / "model.py").write_text(MODEL)
    (folder / "signature.json").write_text(json.dumps(SIGNATURE))
    stack.deploy(
        folder / "model.py",
        "echo",
        "--signature", str(folder / "signature.json"),
        "--min", "1", "--max", "1",
    )  # fmt: skip
    return "echo"


def bits(size: int, rows: int = 1) -> np.ndarray:
    """Any bits at all: numbers, infinities, NaNs with payloads."""
    return np.frombuffer(os.urandom(size * rows), "<f4").reshape(rows, -1)


def blobs(stack: Stack) -> list[Path]:
    return [path for path in (stack.settings.state_path / "data" / "blobs").glob("*/*") if path.is_file()]


def ask(
    stack: Stack, x: np.ndarray, pause: float = 0.0, outputs: tuple[str, ...] = ("y", "first"), **headers: str
) -> httpx.Response:
    pauses = np.full((len(x), 1), pause, "<f4")
    inputs = [
        {
            "name": name,
            "datatype": "FP32",
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in (("x", x), ("pause", pauses))
    ]
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"inputs": inputs, "outputs": wanted}).encode()
    return httpx.post(
        f"{stack.settings.gateway_url}/v2/models/echo/infer",
        content=b"".join((head, x.tobytes(), pauses.tobytes())),
        headers={
            "Inference-Header-Content-Length": str(len(head)),
            "X-Request-Timeout-Ms": "120000",
            **headers,
        },
        timeout=PATIENCE_S,
    )


def tensors(answer: httpx.Response) -> dict[str, bytes]:
    assert answer.status_code == 200, answer.text[:500]
    length = int(answer.headers["inference-header-content-length"])
    at, found = length, {}
    for output in json.loads(answer.content[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = answer.content[at : at + size]
        at += size
    assert at == len(answer.content)
    return found


def gone(stack: Stack, kept: set[str]) -> bool:
    """Whether only what was there before is there still: batches and jobs of other tests keep theirs."""
    end = time.monotonic() + PATIENCE_S
    while left(stack) - kept and time.monotonic() < end:
        time.sleep(0.05)
    return not left(stack) - kept


def left(stack: Stack) -> set[str]:
    return set(map(str, blobs(stack)))


@pytest.mark.parametrize(
    ("size", "rows"), [(600 * 1024, 1), (4 * MIB, 1), (6 * MIB, 1), (20 * MIB, 1), (2 * MIB, 3)]
)
def test_bit_for_bit(stack: Stack, echo: str, size: int, rows: int) -> None:
    x = bits(size, rows)
    kept = left(stack)
    found = tensors(ask(stack, x))
    assert found["y"] == x.tobytes()
    assert found["first"] == x[:, :1].tobytes()
    assert gone(stack, kept), "an answered request leaves nothing behind"


def test_large_in_and_small_out(stack: Stack, echo: str) -> None:
    x = bits(20 * MIB)
    assert tensors(ask(stack, x, outputs=("first",))) == {"first": x[:, :1].tobytes()}


def test_by_the_sdk(client, echo: str) -> None:
    x = np.random.default_rng(3).random((1, 6 * MIB // 4), np.float32)
    answer = client.infer(echo, {"x": x, "pause": np.zeros((1, 1), np.float32)})
    assert (answer["y"] == x).all()


def test_too_large_is_refused(stack: Stack, echo: str) -> None:
    answer = httpx.post(
        f"{stack.settings.gateway_url}/v2/models/echo/infer",
        content=iter([bytes(MIB)] * 300),
        timeout=60,
        headers={"Content-Length": str(300 * MIB)},
    )
    assert (answer.status_code, answer.json()["reason"]) == (413, "payload_too_large")


def test_a_missing_blob_is_told(stack: Stack, echo: str) -> None:
    """The first keeps the only worker busy; the claim of the second is taken away meanwhile."""
    first = threading.Thread(target=ask, args=(stack, bits(400, 1)), kwargs={"pause": 3.0})
    answers: list[httpx.Response] = []
    large = bits(6 * MIB)
    worker = stack.worker("echo-v1")
    kept = set(blobs(stack))
    worker.suspend()
    try:
        first.start()
        second = threading.Thread(target=lambda: answers.append(ask(stack, large)))
        second.start()
        end = time.monotonic() + PATIENCE_S
        while not any(path.suffix != ".part" for path in set(blobs(stack)) - kept):
            assert time.monotonic() < end
            time.sleep(0.02)
        shutil.rmtree(stack.settings.state_path / "data" / "blobs")
    finally:
        worker.resume()
    for thread in (first, second):
        thread.join(PATIENCE_S)
    (answer,) = answers
    assert (answer.status_code, answer.json()["reason"]) == (503, "unavailable")
    assert "blob store" in answer.json()["error"]
    assert tensors(ask(stack, bits(6 * MIB)))


def test_a_worker_that_dies_under_it(stack: Stack, echo: str) -> None:
    """The claim is redeemed again by the next one."""
    x = bits(20 * MIB)
    answers: list[httpx.Response] = []
    kept = left(stack)
    worker = stack.worker("echo-v1")
    caller = threading.Thread(target=lambda: answers.append(ask(stack, x, pause=2.0)))
    caller.start()
    time.sleep(1.0)
    worker.kill()
    caller.join(PATIENCE_S)
    assert tensors(answers[0])["y"] == x.tobytes()
    assert gone(stack, kept)
    assert list(Path("/dev/shm").glob(f"tidegate-*-io-{worker.pid}-*")) == [], (
        "no shared memory is left behind"
    )
