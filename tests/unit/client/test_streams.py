"""The events of a stream and the lines of a batch's results, as the SDK reads them."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from tidegate import AsyncClient, Client
from tidegate.client.batches import read_item
from tidegate.client.codec import Tensor, to_json_input
from tidegate.client.errors import BadAnswer, Unreachable
from tidegate.client.flow import Answer
from tidegate.client.streams import Opened, encode, read_line, shape_of
from tidegate.kernel import errors

METADATA = {
    "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
    "outputs": [
        {"name": "token", "datatype": "BYTES", "shape": [1]},
        {"name": "logits", "datatype": "FP32", "shape": [-1, 2]},
    ],
}
OPENED = Opened(Answer(200, {"x-request-id": "r1"}, b""), METADATA)


def event(**members: Any) -> str:
    return "data: " + orjson.dumps(members).decode()


def test_an_event_becomes_arrays_of_the_declared_types() -> None:
    found = read_line(event(model_name="m", model_version="3", token="hi", logits=[1, 2, 3, 4], n=7), OPENED)
    assert found is not None
    assert (found.model_name, found.model_version, found.request_id) == ("m", "3", "r1")
    assert found["token"].tolist() == [b"hi"]
    assert found["logits"].dtype == np.float32
    assert found["logits"].tolist() == [[1, 2], [3, 4]]
    assert found.parameters == {"n": 7}


def test_lines_between_events_are_no_answers() -> None:
    assert read_line("", OPENED) is None
    assert read_line(": keep-alive", OPENED) is None


def test_the_error_at_the_end_of_a_stream_is_raised() -> None:
    with pytest.raises(errors.ModelFailed, match="as planned") as caught:
        read_line(event(error="as planned", reason="model_failed", request_id="r2"), OPENED)
    assert caught.value.request_id == "r2"


@pytest.mark.parametrize("line", ["data: nonsense", "data: [1]", 'data: {"logits": ["a"]}'])
def test_a_malformed_event_is_a_bad_answer(line: str) -> None:
    with pytest.raises(BadAnswer):
        read_line(line, OPENED)


@pytest.mark.parametrize(
    ("declared", "count", "shape"),
    [([1], 1, [1]), ([-1, 4], 8, [2, 4]), ([-1, -1], 3, [1, 3]), ([-1, -1, -1], 6, [6]), ([2], 3, [3])],
)
def test_the_shape_follows_from_the_signature(declared: list[int], count: int, shape: list[int]) -> None:
    assert shape_of(declared, count) == shape


def test_bytes_become_text_in_a_request() -> None:
    text = np.array([b"a", "\u00e9"], dtype=object)
    body = encode([Tensor("text", "BYTES", text)], "id1", {"temperature": 0.5})
    assert orjson.loads(body) == {"text": ["a", "\u00e9"], "id": "id1", "parameters": {"temperature": 0.5}}


def test_what_json_cannot_carry_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="FP16 cannot be sent as JSON"):
        to_json_input(Tensor("x", "FP16", np.zeros(1, np.float16)))
    with pytest.raises(TypeError, match="not UTF-8"):
        to_json_input(Tensor("x", "BYTES", np.array([b"\xff"], dtype=object)))


class Gateway:
    """Streams three tokens; the second try, after a 429."""

    def __init__(self, *events: str) -> None:
        self.events = events
        self.refused = False
        self.calls: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request.url.path)
        if not request.url.path.endswith("/generate_stream"):
            return httpx.Response(200, json=METADATA)
        if not self.refused:
            self.refused = True
            told = {"error": "slower", "reason": "too_many_requests"}
            return httpx.Response(429, json=told, headers={"Retry-After": "0.01"})
        body = "".join(f"{line}\n\n" for line in self.events).encode()
        return httpx.Response(200, content=body, headers={"Content-Type": "text/event-stream"})


TOKENS = [event(token=word) for word in ("a", "b", "c")]


def test_the_blocking_client_yields_each_answer() -> None:
    gateway = Gateway(*TOKENS)
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        assert [answer["token"][0] for answer in client.stream("m", "hello")] == [b"a", b"b", b"c"]
    assert gateway.calls[-2:] == ["/v2/models/m/generate_stream"] * 2


async def test_the_asynchronous_client_yields_each_answer() -> None:
    gateway = Gateway(*TOKENS)
    async with AsyncClient("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        assert [answer["token"][0] async for answer in client.stream("m", "hello")] == [b"a", b"b", b"c"]


def test_an_error_after_some_answers_comes_after_them() -> None:
    gateway = Gateway(TOKENS[0], event(error="out of memory", reason="model_failed"))
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        answers = client.stream("m", "hello")
        assert next(answers)["token"][0] == b"a"
        with pytest.raises(errors.ModelFailed, match="out of memory"):
            next(answers)


def test_a_stream_that_breaks_off_is_unreachable() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/generate_stream"):
            return httpx.Response(200, json=METADATA)

        def pieces() -> Any:
            yield f"{TOKENS[0]}\n\n".encode()
            raise httpx.RemoteProtocolError("closed")

        return httpx.Response(200, content=pieces())

    with Client("http://gateway:1", transport=httpx.MockTransport(broken)) as client:
        answers = client.stream("m", "hello")
        assert next(answers)["token"][0] == b"a"
        with pytest.raises(Unreachable):
            next(answers)


def test_a_line_of_a_batch_is_a_result_or_an_error() -> None:
    output = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    response = {"model_name": "m", "model_version": "1", "outputs": [output]}
    good = {"line": 0, "id": None, "job": "j", "status": "succeeded", "response": response}
    item = read_item(orjson.dumps(good).decode())
    assert item.get()["y"].tolist() == [[1, 2]]
    failed = {"line": 1, "status": "failed", "error": {"reason": "bad_request", "message": "no input"}}
    item = read_item(orjson.dumps(failed).decode())
    assert item.status == "failed"
    with pytest.raises(errors.BadRequest, match="no input"):
        item.get()
    with pytest.raises(BadAnswer):
        read_item("[]")
