"""Both clients against one gateway that answers from memory: the calls, the errors, the metadata."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tidegate import AsyncClient, Client
from tidegate.client import codec
from tidegate.client.codec import HEAD_LENGTH, Tensor
from tidegate.client.errors import BadAnswer, Unreachable
from tidegate.kernel import errors


class Gateway:
    """Model ``double``: ``y`` = 2 * ``x``, of the datatype that ``datatype`` says now."""

    def __init__(self) -> None:
        self.datatype = "FP32"
        self.known_after: float = 0
        self.ready_after = 0
        self.calls: list[str] = []
        self.headers: httpx.Headers = httpx.Headers()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(f"{request.method} {request.url.raw_path.decode()}")
        self.headers = request.headers
        path = request.url.path.removeprefix("/v2/models/double").removeprefix("/versions/1")
        if path == "/infer":
            return self._infer(request)
        if path == "/ready":
            self.ready_after -= 1
            return httpx.Response(200 if self.ready_after < 0 else 503)
        if request.url.path == "/v2/repository/index":
            return httpx.Response(200, json=[{"name": "double", "version": "1", "state": "READY"}])
        if path == "" and self.known_after > 0:
            self.known_after -= 1
            return self._refuse(503, "not_known_yet", {"Retry-After": "0.01"})
        if path == "":
            inputs = [{"name": "x", "datatype": self.datatype, "shape": [-1]}]
            return httpx.Response(200, json={"name": "double", "inputs": inputs})
        return self._refuse(404, "not_found")

    def _refuse(self, status: int, reason: str, headers: dict[str, str] | None = None) -> httpx.Response:
        told = {"error": f"it is {reason}", "reason": reason, "request_id": "r"}
        return httpx.Response(status, json=told, headers=headers)

    def _infer(self, request: httpx.Request) -> httpx.Response:
        length = int(request.headers[HEAD_LENGTH])
        head = orjson.loads(request.content[:length])
        given = head["inputs"][0]
        if given["datatype"] != self.datatype:
            return self._refuse(400, "bad_request")
        array = codec.from_raw(request.content[length:], self.datatype, given["shape"])
        raw = codec.to_raw(array * 2, self.datatype)
        answer = orjson.dumps(
            {
                "model_name": "double",
                "model_version": "1",
                "parameters": {"echo": head["parameters"].get("echo")},
                "outputs": [{**given, "name": "y", "parameters": {"binary_data_size": len(raw)}}],
            }
        )
        headers = {
            HEAD_LENGTH: str(len(answer)),
            "Server-Timing": 'wait;dur=1.5, compute;desc="model";dur=2, total;dur=4.25, cached',
            "X-Request-Id": request.headers.get("x-request-id", "made-up"),
        }
        return httpx.Response(200, content=answer + raw, headers=headers)


class Blocking:
    """The asynchronous client, called like the other one."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            return asyncio.run(getattr(self._client, name)(*args, **named))

        return call


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    def build(handler: Callable[[httpx.Request], httpx.Response], **options: Any) -> Any:
        transport = httpx.MockTransport(handler)
        if request.param == "sync":
            return Client("http://gateway:1/", transport=transport, **options)
        return Blocking(AsyncClient("http://gateway:1/", transport=transport, **options))

    return build


def test_both_clients_have_the_same_calls() -> None:
    names = [name for name, _ in inspect.getmembers(Client, inspect.isfunction) if name[0] != "_"]
    assert {"infer", "submit", "stream", "submit_batch", "metadata", "models", "chat"} <= set(names)
    for name in names:
        blocking, awaited = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(blocking).parameters == inspect.signature(awaited).parameters
        if name not in {"chat", "complete"}:  # they return an awaitable or a stream
            assert inspect.iscoroutinefunction(awaited) or inspect.isasyncgenfunction(awaited)


def test_infer(make: Any, gateway: Gateway) -> None:
    client = make(gateway, api_key="secret")
    x = np.array([1.5, 2.5], np.float32)
    result = client.infer("double", {"x": x}, request_id="mine", parameters={"echo": 7})
    np.testing.assert_array_equal(result["y"], x * 2)
    assert list(result) == ["y"]
    assert (result.model_name, result.model_version, result.request_id) == ("double", "1", "mine")
    assert result.parameters == {"echo": 7}
    assert result.timing == {"wait": 1.5, "compute": 2.0, "total": 4.25}
    assert gateway.headers["Authorization"] == "Bearer secret"
    with pytest.raises(KeyError, match="no output 'z'; the outputs are: y"):
        result["z"]


@pytest.mark.parametrize(("parameters", "sent"), [({"echo": 1}, 2), ({"sequence_id": 7}, 1)])
def test_a_request_of_a_sequence_is_sent_once(
    make: Any, gateway: Gateway, parameters: dict[str, int], sent: int
) -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        answer = gateway(request)
        if request.url.path.endswith("/infer"):
            raise httpx.ReadError("the connection broke")
        return answer

    with pytest.raises(Unreachable):
        make(broken, retries=1).infer("double", [1], parameters=parameters)
    assert gateway.calls.count("POST /v2/models/double/infer") == sent


def test_a_bare_array_goes_to_the_only_input(make: Any, gateway: Gateway) -> None:
    assert make(gateway).infer("double", [1, 2])["y"].tolist() == [2.0, 4.0]


def test_metadata_is_asked_for_once(make: Any, gateway: Gateway) -> None:
    client = make(gateway)
    for _ in range(3):
        client.infer("double", [1.0], version=1)
    path = "/v2/models/double/versions/1"
    assert gateway.calls == [f"GET {path}", *[f"POST {path}/infer"] * 3]


async def test_many_first_calls_ask_for_metadata_once(gateway: Gateway) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        return gateway(request)

    async with AsyncClient("http://gateway:1", transport=httpx.MockTransport(handle)) as client:
        results = await asyncio.gather(*(client.infer("double", [float(i)]) for i in range(20)))
    assert [result["y"].tolist() for result in results] == [[2.0 * i] for i in range(20)]
    assert [call for call in gateway.calls if call.startswith("GET")] == ["GET /v2/models/double"]


def test_a_changed_signature_is_learnt(make: Any, gateway: Gateway) -> None:
    client = make(gateway)
    client.infer("double", [1.0])
    gateway.datatype = "FP64"
    assert client.infer("double", [1.0])["y"].dtype == np.float64
    assert client.infer("double", np.array([0.1]))["y"].dtype == np.float64


def test_a_misfit_is_told_before_anything_is_sent(make: Any, gateway: Gateway) -> None:
    with pytest.raises(TypeError, match="the model expects FP32"):
        make(gateway).infer("double", np.array([1e300]))
    assert gateway.calls == ["GET /v2/models/double"]


def test_without_a_known_signature_the_arrays_decide(make: Any, gateway: Gateway) -> None:
    gateway.known_after = math.inf
    client = make(gateway)
    assert client.infer("double", {"x": np.array([1], np.float32)})["y"].tolist() == [2]
    assert gateway.calls == ["GET /v2/models/double", "POST /v2/models/double/infer"], "nothing is waited for"
    with pytest.raises(errors.Unavailable, match="it is not_known_yet"):
        client.infer("double", np.array([1], np.float32), timeout_s=2)


def test_a_bare_array_waits_for_the_signature_of_a_model_that_wakes(make: Any, gateway: Gateway) -> None:
    gateway.known_after = 4
    client = make(gateway, retries=0)
    assert client.infer("double", np.array([1], np.float32))["y"].tolist() == [2]
    assert gateway.calls == ["GET /v2/models/double"] * 5 + ["POST /v2/models/double/infer"]


def test_no_such_model(make: Any, gateway: Gateway) -> None:
    with pytest.raises(errors.NotFound, match="it is not_found"):
        make(gateway).infer("other", {"x": np.array([1], np.float32)})
    assert gateway.calls == ["GET /v2/models/other"]


def test_readiness(make: Any, gateway: Gateway) -> None:
    client = make(gateway)
    gateway.ready_after = 1
    assert client.is_ready("double") is False
    assert client.is_ready("double") is True
    assert client.is_ready("other") is False
    client.wait_ready("double", 5)
    with pytest.raises(errors.DeadlinePassed, match=r"Not ready after 0\.01 s: "):
        client.wait_ready("other", 0.01)


def test_models_and_metadata(make: Any, gateway: Gateway) -> None:
    client = make(gateway)
    assert [model["name"] for model in client.models()] == ["double"]
    assert client.metadata("double")["inputs"][0]["datatype"] == "FP32"
    with pytest.raises(errors.NotFound, match="it is not_found"):
        client.metadata("a/b")
    assert gateway.calls[-1] == "GET /v2/models/a%2Fb"


def test_no_gateway(make: Any) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    client = make(refuse, retries=0)
    with pytest.raises(Unreachable, match="does not answer at http://gateway:1: refused"):
        client.infer("double", [1.0])
    with pytest.raises(Unreachable):
        client.is_ready("double")


def test_silence_is_a_missed_deadline(make: Any) -> None:
    def silence(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("")

    with pytest.raises(errors.DeadlinePassed):
        make(silence).metadata("double")


def test_somebody_else_answers(make: Any) -> None:
    client = make(lambda _: httpx.Response(200, text="hello"))
    with pytest.raises(BadAnswer):
        client.metadata("double")
    with pytest.raises(BadAnswer):
        client.models()


def test_a_url_is_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"not an http\(s\) URL"):
        Client("gateway:8000")


def test_the_url_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_GATEWAY_URL", "http://there:9/")
    with Client() as client:
        assert client.url == "http://there:9"


def test_an_input_without_a_tensor(make: Any, gateway: Gateway) -> None:
    tensor = Tensor("x", "FP32", np.zeros(1, np.float32))
    assert tensor.array.shape == (1,)
    with pytest.raises(TypeError, match="input 'x'"):
        make(gateway).infer("double", {"x": None})
