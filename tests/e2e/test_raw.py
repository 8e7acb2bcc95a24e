"""A body that is nothing but the data of the only input is answered as Triton answers it, byte for byte.

One model for each kind of input, deployed from a Triton directory, and the same directories served by a
Triton of the test's own.
"""

from __future__ import annotations

import gzip
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Stack
from tests.e2e.direct import Doors, running_triton

pytestmark = pytest.mark.e2e

HEADER = "Inference-Header-Content-Length"
PATIENCE_S = 120.0

MODEL = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [request.inputs()[0].as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
"""

# name: datatype, dims, max_batch_size
SERVED: dict[str, tuple[str, list[int], int]] = {
    "raw-fixed": ("FP32", [3], 8),
    "raw-open": ("FP32", [-1, 2], 0),
    "raw-open-rows": ("FP32", [2, -1], 8),
    "raw-text": ("STRING", [1], 8),
    "raw-text-flat": ("STRING", [1, 1], 0),
    "raw-half": ("FP16", [2], 8),
}
# Their inputs cannot be told from a body; so no replica is needed to say no.
REFUSED: dict[str, tuple[str, list[int], int]] = {
    "raw-two-open": ("FP32", [-1, -1], 0),
    "raw-texts": ("STRING", [-1], 8),
    "raw-pair": ("FP32", [1], 0),
}


def config(name: str, datatype: str, dims: list[int], max_batch: int) -> str:
    inputs = ["x", "z"] if name == "raw-pair" else ["x"]
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "python"',
            f"max_batch_size: {max_batch}",
            *(f'input {{ name: "{x}" data_type: TYPE_{datatype} dims: {dims} }}' for x in inputs),
            f'output {{ name: "y" data_type: TYPE_{datatype} dims: {dims} }}',
        ]
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Triton model repository with the models in it."""
    repository = tmp_path_factory.mktemp("raw")
    for name, (datatype, dims, max_batch) in (SERVED | REFUSED).items():
        version = repository / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        (version.parent / "config.pbtxt").write_text(config(name, datatype, dims, max_batch))
    return repository


@pytest.fixture(scope="module")
def direct(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """A Triton of its own."""
    with running_triton(directory, tmp_path_factory.mktemp("triton") / "log") as doors:
        yield doors


@pytest.fixture(scope="module")
def gateway(stack: Stack, directory: Path) -> Doors:
    """The gateway, with the same directories deployed."""
    for name in SERVED:
        _deploy(stack, directory / name, "1")
    for name in REFUSED:
        _deploy(stack, directory / name, "0")
    for name in SERVED | REFUSED:
        _wait_known(stack, name, ready=name in SERVED)
    return Doors(stack.settings.gateway_url, stack.settings.gateway_grpc_target)


def _deploy(stack: Stack, folder: Path, least: str) -> None:
    stack.cli("deploy", str(folder), "--name", folder.name, "--min", least, "--max", "1", "--no-wait")


def _wait_known(stack: Stack, name: str, ready: bool) -> None:
    end = time.monotonic() + PATIENCE_S
    path = f"{stack.settings.gateway_url}/v2/models/{name}{'/ready' if ready else ''}"
    while httpx.get(path, timeout=PATIENCE_S).status_code != 200:
        assert time.monotonic() < end, f"{name} is not there"
        time.sleep(0.1)


def ask(doors: Doors, model: str, body: bytes, **headers: str) -> httpx.Response:
    # Unasked, httpx says that it takes gzip, and Triton then compresses its answer.
    given = {HEADER: "0", "Accept-Encoding": "identity"} | headers
    return httpx.post(f"{doors.http}/v2/models/{model}/infer", content=body, headers=given, timeout=60)


BODIES = [
    ("raw-fixed", struct.pack("<3f", 1, -2.5, float("nan"))),
    ("raw-open", struct.pack("<2f", 1, 2)),
    ("raw-open", struct.pack("<8f", *range(8))),
    ("raw-open", b""),
    ("raw-open-rows", struct.pack("<6f", *range(6))),
    ("raw-text", "größe".encode()),
    ("raw-text", b"\xff\0" + bytes(300_000)),
    ("raw-text", b""),
    ("raw-text-flat", b"one"),
    ("raw-half", b"\0\x3c\0\x40"),
]


@pytest.mark.parametrize(("model", "body"), BODIES, ids=[f"{m}-{len(b)}" for m, b in BODIES])
def test_the_answer_is_tritons(gateway: Doors, direct: Doors, model: str, body: bytes):
    expected, got = (ask(doors, model, body) for doors in (direct, gateway))
    assert expected.status_code == 200
    assert (got.status_code, got.content) == (200, expected.content)
    for name in (HEADER, "content-type", "content-length"):
        assert got.headers.get(name) == expected.headers.get(name)
    assert got.content.endswith(body), "it is the identity"


def test_a_compressed_body(gateway: Doors, direct: Doors):
    body = gzip.compress(struct.pack("<3f", 1, 2, 3))
    expected, got = (
        ask(doors, "raw-fixed", body, **{"Content-Encoding": "gzip"}) for doors in (direct, gateway)
    )
    assert (got.status_code, got.content) == (expected.status_code, expected.content)
    assert expected.status_code == 200


@pytest.mark.parametrize(
    ("model", "body", "told"),
    [
        ("raw-fixed", bytes(24), "input 'x': FP32 [1, 3] needs 12 bytes, got 24"),
        ("raw-fixed", bytes(8), "input 'x': FP32 [1, 3] needs 12 bytes, got 8"),
        ("raw-fixed", b"", "input 'x': FP32 [1, 3] needs 12 bytes, got 0"),
        ("raw-open", bytes(12), "input 'x': FP32 [-1, 2] needs a multiple of 8 bytes, got 12"),
        ("raw-two-open", bytes(8), "but [-1, -1] has more"),
        ("raw-texts", b"a", "a raw body is one element of BYTES, but the shape is [1, -1]"),
        ("raw-pair", bytes(4), "the model takes ['x', 'z']"),
    ],
)
def test_what_triton_refuses(gateway: Doors, direct: Doors, model: str, body: bytes, told: str):
    assert ask(direct, model, body).status_code == 400
    answer = ask(gateway, model, body)
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_request")
    assert told in answer.json()["error"]


def test_later_as_well(gateway: Doors, direct: Doors):
    body = struct.pack("<3f", 1, 2, 3)
    answer = ask(gateway, "raw-fixed", body, Prefer="wait=30")
    assert (answer.status_code, answer.content) == (200, ask(direct, "raw-fixed", body).content)
    nameless = httpx.post(f"{gateway.http}/v1/jobs", content=body, headers={HEADER: "0"}, timeout=PATIENCE_S)
    assert nameless.status_code == 400
    assert "must name the model of the job" in nameless.json()["error"]


def test_a_model_that_only_a_replica_knows(stack: Stack, tmp_path: Path):
    """Its directory does not say what it takes; being asked wakes it."""
    version = tmp_path / "raw-shy" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text('backend: "python"')
    source = """
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [3]})
        config.add_output({"name": "y", "data_type": "TYPE_FP32", "dims": [3]})
        config.set_max_batch_size(0)
        return config
"""
    (version / "model.py").write_text(MODEL + source)
    _deploy(stack, version.parent, "0")
    door = Doors(stack.settings.gateway_url, "")
    body = struct.pack("<3f", 1, 2, 3)
    told, end = [], time.monotonic() + PATIENCE_S
    while (answer := ask(door, "raw-shy", body)).status_code != 200 and time.monotonic() < end:
        told.append((answer.status_code, answer.json()["error"], answer.headers.get("retry-after")))
        time.sleep(0.1)
    assert answer.status_code == 200, told
    assert (503, "the model's inputs are not known until the first replica is ready", "2") in told
    (output,) = json.loads(answer.content[: int(answer.headers[HEADER])])["outputs"]
    assert output["shape"] == [3]
