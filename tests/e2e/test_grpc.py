"""Clients as their users have them, unmodified: Triton's over gRPC and HTTP, plain and asyncio; KServe's."""

from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException

from benchmarks import places
from benchmarks.install import installed
from tests.conftest import PATIENCE_S
from tests.e2e.conftest import REPO, Stack

pytestmark = pytest.mark.e2e

IDENTITY = "identity-grpc"
TOKENS = "tokens-grpc"


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 16)).astype(np.float32)


def x(array: np.ndarray, module: Any = triton) -> Any:
    made = module.InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return made


@pytest.fixture(scope="module")
def identity(deploy_python: Callable[..., str]) -> str:
    return deploy_python("identity", IDENTITY, "--min", "1", "--max", "1")


@pytest.fixture(scope="module")
def tokens(stack: Stack) -> str:
    """A model that gives many answers to one request."""
    stack.deploy(REPO / "examples" / "python-model" / "tokens", TOKENS, "--min", "1", "--max", "1")
    return TOKENS


@pytest.fixture
def client(stack: Stack, identity: str) -> Iterator[Any]:
    with triton.InferenceServerClient(stack.settings.gateway_grpc_target) as found:
        yield found


def test_the_plain_client(client: Any, identity: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(identity)
    metadata = client.get_model_metadata(identity)
    assert (metadata.name, metadata.inputs[0].name, list(metadata.inputs[0].shape)) == (
        identity,
        "x",
        [-1, 16],
    )
    config = client.get_model_config(identity).config
    assert (config.name, config.backend, config.max_batch_size) == (identity, "python", 256)
    assert config.input[0].data_type == 11, "TYPE_FP32"
    array = rows(5)
    answer = client.infer(identity, [x(array)], request_id="seven", client_timeout=120)
    assert (answer.as_numpy("y") == array).all()
    assert answer.get_response().id == "seven"
    found: queue.Queue[Any] = queue.Queue()
    client.async_infer(identity, [x(array)], lambda result, error: found.put((result, error)))
    result, error = found.get(timeout=120)
    assert error is None
    assert (result.as_numpy("y") == array).all()


def test_what_is_wrong_is_said(client: Any, identity: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(identity, [x(rows(300))])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message() == (
        f"inference request batch-size must be <= 256 for {identity!r}: input 'x' has 300 rows, and needs 1 "
        "to 256"
    )
    with pytest.raises(InferenceServerException) as caught:
        client.infer("nobody", [x(rows(1))])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException) as caught:
        client.unload_model(identity)
    assert caught.value.status() == "StatusCode.UNAUTHENTICATED"


def test_a_stream_of_requests(client: Any, identity: str) -> None:
    found: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)))
    arrays = [rows(1 + number % 7) for number in range(100)]
    for number, array in enumerate(arrays):
        client.async_stream_infer(identity, [x(array)], request_id=str(number))
        if number == 50:
            client.async_stream_infer("nobody", [x(array)])
    answers = [found.get(timeout=120) for _ in range(101)]
    client.stop_stream()
    errors = [error for _, error in answers if error is not None]
    assert [error.message() for error in errors] == [
        "Request for unknown model: 'nobody' is not found: GET /v2/models lists all"
    ]
    results = [result for result, error in answers if error is None]
    assert [result.get_response().id for result in results] == [str(n) for n in range(100)]
    assert all((r.as_numpy("y") == a).all() for r, a in zip(results, arrays, strict=True))


def test_a_stream_of_answers(client: Any, tokens: str) -> None:
    """One answer for each word, as it is made; and the last word about them if it is asked for."""
    text = triton.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"one two three"], object))
    found: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)))
    client.async_stream_infer(tokens, [text], request_id="a", enable_empty_final_response=True)
    answers: list[Any] = []
    while not answers or not answers[-1].get_response().parameters["triton_final_response"].bool_param:
        result, error = found.get(timeout=60)
        assert error is None, error
        answers.append(result)
    client.stop_stream()
    assert len(answers) > 1
    assert {answer.get_response().id for answer in answers} == {"a"}
    assert not answers[-1].get_response().outputs, "the last one has nothing but the end in it"


async def test_the_asyncio_client(stack: Stack, identity: str) -> None:
    async with triton_aio.InferenceServerClient(stack.settings.gateway_grpc_target) as client:
        arrays = [rows(1 + number % 5) for number in range(64)]
        answers = await asyncio.gather(*(client.infer(identity, [x(a)], timeout=120_000_000) for a in arrays))
        assert all((r.as_numpy("y") == a).all() for r, a in zip(answers, arrays, strict=True))

        async def requests() -> Any:
            for array in arrays[:5]:
                yield {"model_name": identity, "inputs": [x(array)]}

        streamed = [pair async for pair in client.stream_infer(requests())]
        assert [error for _, error in streamed] == [None] * 5
        assert all((r.as_numpy("y") == a).all() for (r, _), a in zip(streamed, arrays[:5], strict=True))


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
async def test_the_asyncio_client_over_http(stack: Stack, identity: str, coding: str | None) -> None:
    address = stack.settings.gateway_url.removeprefix("http://")
    async with triton_http_aio.InferenceServerClient(address) as client:
        assert await client.is_model_ready(identity)
        assert (await client.get_model_config(identity))["name"] == identity
        array = rows(40)
        for binary in (True, False):
            output = triton_http_aio.InferRequestedOutput("y", binary_data=binary)
            answer = await client.infer(
                identity,
                [x(array, triton_http_aio)],
                outputs=[output],
                request_compression_algorithm=coding,
                response_compression_algorithm=coding,
            )
            assert (answer.as_numpy("y") == array).all()


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_the_plain_client_over_http(stack: Stack, identity: str, coding: str | None) -> None:
    with triton_http.InferenceServerClient(stack.settings.gateway_url.removeprefix("http://")) as client:
        array = rows(40)
        answer = client.infer(
            identity,
            [x(array, triton_http)],
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        assert (answer.as_numpy("y") == array).all()
        assert client.get_inference_statistics(identity)["model_stats"][0]["name"] == identity


def test_statistics_count_every_request_once(client: Any, stack: Stack, identity: str) -> None:
    """Requests that share model calls are counted one by one, and HTTP and gRPC tell the same."""

    def counted() -> tuple[int, int]:
        (found,) = client.get_inference_statistics(identity).model_stats
        return found.inference_stats.success.count, found.inference_count

    before = settled(counted)
    found: queue.Queue[Any] = queue.Queue()
    for _ in range(50):
        client.async_infer(identity, [x(rows(3))], lambda result, error: found.put(error))
    assert [found.get(timeout=120) for _ in range(50)] == [None] * 50
    wanted = (before[0] + 50, before[1] + 150)
    end = time.monotonic() + PATIENCE_S
    while counted() != wanted and time.monotonic() < end:
        time.sleep(0.1)
    assert counted() == wanted
    (told,) = httpx.get(f"{stack.settings.gateway_url}/v2/models/{identity}/stats").json()["model_stats"]
    assert told["inference_stats"]["success"]["count"] == wanted[0]
    assert told["inference_stats"]["queue"]["count"] == told["inference_stats"]["compute_infer"]["count"]
    assert 0 < told["execution_count"] <= wanted[0]
    assert told["inference_stats"]["success"]["ns"] > told["inference_stats"]["compute_infer"]["ns"] > 0


def settled(read: Callable[[], Any]) -> Any:
    """What is read when it no longer changes."""
    last = read()
    while True:
        time.sleep(5.0)
        now = read()
        if now == last:
            return now
        last = now


def test_model_control(client: Any, stack: Stack, identity: str) -> None:
    """Loading and unloading need the scope operate, and do what `resume` and `pause` do."""
    operator = {"authorization": f"Bearer {stack.settings.service_token}"}
    client.unload_model(identity, headers=operator)
    assert not client.is_model_ready(identity)
    (found,) = [each for each in client.get_model_repository_index().models if each.name == identity]
    assert (found.state, found.reason[:8]) == ("UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException, match="at 0 replicas"):
        client.infer(identity, [x(rows(1))])
    with triton_http.InferenceServerClient(stack.settings.gateway_url.removeprefix("http://")) as over_http:
        with pytest.raises(InferenceServerException, match=r"failed to load .*, a load cannot include"):
            over_http.load_model(identity, headers=operator, config='{"max_batch_size": 16}')
        over_http.load_model(identity, headers=operator)
        assert over_http.is_model_ready(identity)
    assert (client.infer(identity, [x(rows(2))]).as_numpy("y") == rows(2)).all()
    with pytest.raises(InferenceServerException, match="failed to load 'nobody', failed to poll"):
        client.load_model("nobody", headers=operator)


def test_standard_health(stack: Stack) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(stack.settings.gateway_grpc_target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=PATIENCE_S
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferOutput, InferRequest, RESTConfig

async def main(url, model):
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=60))
    array = np.arange(32, dtype=np.float32).reshape(2, 16)
    told = {"ready": await client.is_server_ready(url), "model": await client.is_model_ready(url, model)}
    for binary in (False, True):
        given = InferInput("x", list(array.shape), "FP32")
        given.set_data_from_numpy(array, binary_data=binary)
        request = InferRequest(model_name=model, infer_inputs=[given])
        answer = await client.infer(url, request, model_name=model)
        told[f"binary {binary}"] = (answer.outputs[0].as_numpy() == array).all().item()
    print(json.dumps(told))

asyncio.run(main(*sys.argv[1:]))
"""


def test_kserve(stack: Stack, identity: str) -> None:
    """In an environment of its own, which the benchmarks share."""
    if not installed("kserve"):
        pytest.skip("KServe's client has an environment of its own, which `make test-clients` installs")
    done = subprocess.run(
        [places.python("kserve"), "-c", KSERVE, stack.settings.gateway_url, identity],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1]).values()) == {True}
