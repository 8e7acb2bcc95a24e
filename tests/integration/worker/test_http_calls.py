"""Quick calls go to Triton over HTTP, with the same answers as over gRPC, and no answers are mixed up."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from services.worker.adapters import model as model_module
from services.worker.adapters.http_calls import CallFailed, ConnectionEnded, HttpCalls, NotListening
from services.worker.adapters.model import Model
from services.worker.adapters.triton_client import TritonClient
from services.worker.domain.call_duration import Quickness
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import BadRequest, DeadlinePassed, ModelFailed, Unavailable
from tidegate.kernel.protocol.envelope import Request, call_key, read_request, request_frame, tensor
from tidegate.kernel.protocol.models import Signature, TensorSpec

pytestmark = pytest.mark.integration

ECHO = """
import time
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        get = lambda name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        numbers, words = get("numbers"), get("words")
        if numbers.size and numbers[0, 0] < 0:
            raise ValueError("a negative number")
        if numbers.size and numbers[0, 0] > 1000:
            time.sleep(30 if numbers[0, 0] > 1e6 else 1.0)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("numbers_back", numbers), pb_utils.Tensor("words_back", words),
        ])
"""
SIGNATURE = Signature(
    inputs=[
        TensorSpec(name="numbers", datatype="FP32", shape=[-1]),
        TensorSpec(name="words", datatype="BYTES", shape=[1]),
    ],
    outputs=[
        TensorSpec(name="numbers_back", datatype="FP32", shape=[-1]),
        TensorSpec(name="words_back", datatype="BYTES", shape=[1]),
    ],
    max_batch_size=64,
)
SLOW = 2000.0
HALF_A_MINUTE = 2e6


def request(first: float, *, width=2, rows=1, word=b"word", outputs=(), parameters=None) -> Request:
    numbers = np.tile(np.array([first, *range(1, width)][:width], np.float32), (rows, 1))
    inputs = (tensor("numbers", "FP32", (width,)), tensor("words", "BYTES", (1,)))
    words = (len(word).to_bytes(4, "little") + word) * rows
    key = call_key(inputs, tuple(outputs), parameters or {})
    frame = request_frame(os.urandom(16), 1, rows, key, [numbers.tobytes(), words], flags=1)
    return read_request(memoryview(frame))


class Ways:
    """A model, and a record of the ways that its calls took."""

    def __init__(self, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running = running
        self.model = Model(running.client, running.model, SIGNATURE.outputs)
        self.went: list[str] = []
        for way, name in (("http", "infer_http"), ("grpc", "infer_raw")):
            monkeypatch.setattr(TritonClient, name, self._noted(way, getattr(TritonClient, name)))

    def _noted(
        self, way: str, original: Callable[..., Awaitable[object]]
    ) -> Callable[..., Awaitable[object]]:
        async def noted(*given: object) -> object:
            self.went.append(way)
            return await original(*given)

        return noted

    async def ask(self, *requests: Request, timeout_s: float = 60) -> list[tuple[object, ...]]:
        answer = await self.model.call(list(requests), timeout_s)
        return [(o.name, o.datatype, o.shape, bytes(o.raw)) for o in answer.outputs]


@pytest.fixture
async def echo(run, tmp_path, monkeypatch) -> Ways:
    """A model whose calls are known to be quick, even on a busy machine."""
    monkeypatch.setattr(model_module, "QUICK_S", 0.05)
    (tmp_path / "model.py").write_text(ECHO)
    running = await run("python", tmp_path / "model.py", SIGNATURE)
    found = Ways(running, monkeypatch)
    await until_quick(found)
    return found


async def until_quick(ways: Ways) -> None:
    """Call until a call goes over HTTP."""
    async with asyncio.timeout(PATIENCE_S):
        await ways.ask(request(1.0))
        while ways.went[-1] != "http":
            await ways.ask(request(1.0))


async def test_the_answers_are_those_of_grpc(echo):
    asked: list[list[Request]] = [
        [request(1.0)],
        [request(2.0, rows=3, word=b"another")],
        [request(3.0), request(4.0, rows=2), request(5.0)],
        [request(6.0, outputs=("words_back",))],
        [request(7.0, outputs=("words_back", "numbers_back"))],
        [request(8.0, word=b"")],
        [request(9.0, width=5000, word=bytes(range(256)))],
    ]
    echo.model._quickness = Quickness(60.0)
    await until_quick(echo)
    echo.went.clear()
    over_http = [await echo.ask(*requests) for requests in asked]
    assert echo.went == ["http"] * len(asked)
    echo.model._quickness = Quickness(0.0)
    echo.went.clear()
    assert [await echo.ask(*requests) for requests in asked] == over_http
    assert echo.went == ["grpc"] * len(asked)


PARAMETERS = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor("said", np.array([[request.parameters().encode()]], np.object_))]
            )
            for request in requests
        ]
"""


async def test_parameters_are_those_of_grpc(run, tmp_path, monkeypatch):
    """The parameters of a request and those of a job."""
    monkeypatch.setattr(model_module, "QUICK_S", 5.0)
    (tmp_path / "model.py").write_text(PARAMETERS)
    signature = Signature(
        inputs=SIGNATURE.inputs,
        outputs=[TensorSpec(name="said", datatype="BYTES", shape=[1])],
        max_batch_size=1,
    )
    ways = Ways(await run("python", tmp_path / "model.py", signature), monkeypatch)
    own = {"yes": True, "no": False, "least": -(2**63), "most": 2**63 - 1, "empty": "", "text": 'a "ü" \n b'}
    job = {"job": "j-1", "attempt": "2"}
    await ways.ask(request(1.0))
    said: dict[str, dict[str, object]] = {}
    for way in ("http", "grpc"):
        ways.went.clear()
        answer = await ways.model.call([request(1.0, parameters=own)], 10, job)
        assert ways.went == [way]
        said[way] = json.loads(bytes(answer.outputs[0].raw)[4:])
        ways.model._quickness = Quickness(0.0)
    assert said["http"].pop("binary_data_output", True) is True
    assert said["http"] == said["grpc"]
    assert said["grpc"] == own | job


async def test_what_is_not_for_http_goes_over_grpc(echo):
    for each in (
        request(1.0, parameters={"a": 1.5}),
        request(1.0, parameters={"binary_data_output": False}),
        request(1.0, width=0),
        request(1.0, width=model_module.QUICK_BYTES // 4 + 1),
    ):
        echo.went.clear()
        assert (await echo.ask(each))[0][0] == "numbers_back"
        assert echo.went == ["grpc"]


async def test_a_name_that_a_path_cannot_have_goes_over_grpc(run, tmp_path, monkeypatch):
    """Triton looks the name up as it is in the path, with percent escapes."""
    monkeypatch.setattr(model_module, "QUICK_S", 5.0)
    folder = tmp_path / "a+b" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(ECHO)
    config = 'backend: "python" max_batch_size: 64 ' + "".join(
        f'{kind} {{ name: "{name}{back}" data_type: TYPE_{datatype} dims: {dim} }} '
        for kind, back in (("input", ""), ("output", "_back"))
        for name, datatype, dim in (("numbers", "FP32", -1), ("words", "STRING", 1))
    )
    (tmp_path / "a+b" / "config.pbtxt").write_text(config)
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "a+b")
    running = await run("triton", Path(archive), SIGNATURE)
    assert running.model == "a+b"
    ways = Ways(running, monkeypatch)
    for _ in range(3):
        assert (await ways.ask(request(1.0)))[0][0] == "numbers_back"
    assert ways.went == ["grpc"] * 3


async def refused(ways: Ways, wrong: Request, way: str) -> BadRequest:
    """Return the error of a wrong request that goes this way. On a busy machine a quick call may be slow."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if way == "http":
                await until_quick(ways)
            ways.went.clear()
            with pytest.raises(BadRequest) as bad:
                await ways.ask(wrong)
            if ways.went == [way]:
                return bad.value


async def test_the_errors_are_those_of_grpc(echo):
    wrong = request(1.0)._replace(
        key=call_key((tensor("nombres", "FP32", (2,)), tensor("words", "BYTES", (1,))), (), {})
    )
    told: list[list[str]] = []
    for way in ("http", "grpc"):
        bad = await refused(echo, wrong, way)
        with pytest.raises(ModelFailed) as failed:
            await echo.ask(request(-1.0))
        with pytest.raises(DeadlinePassed) as late:
            await echo.ask(request(SLOW), timeout_s=0.05)
        told.append([bad.message, failed.value.message, late.value.message])
        assert echo.went == [way] * 3, "after one that was given up it is gRPC"
    assert told[0] == told[1]
    assert "nombres" in told[0][0]
    assert "a negative number" in told[0][1]


@pytest.mark.parametrize("given_up", [True, False])
async def test_a_model_that_turns_out_slow_goes_over_grpc_until_it_is_quick_again(echo, given_up):
    """Over gRPC its calls can be cancelled."""
    if given_up:
        call = asyncio.create_task(echo.ask(request(SLOW)))
        await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    else:
        await echo.ask(request(SLOW))
    echo.went.clear()
    await echo.ask(request(1.0))
    assert echo.went == ["grpc"]
    await until_quick(echo)


async def test_a_late_answer_is_not_the_next_one(echo, until):
    for _ in range(2):
        echo.model._quickness = Quickness(60.0)
        await until_quick(echo)
        calls = [asyncio.create_task(echo.ask(request(SLOW), timeout_s=0.1)) for _ in range(3)]
        calls.append(asyncio.create_task(echo.ask(request(SLOW + 1))))
        echo.went.clear()
        await until(lambda: len(echo.went) == 4)
        calls[-1].cancel()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(end) for end in ends] == [DeadlinePassed] * 3 + [asyncio.CancelledError]
        assert echo.went == ["http"] * 4
        await until_quick(echo)
    answers = await asyncio.gather(*(echo.ask(request(float(n))) for n in range(20)))
    assert [np.frombuffer(found[0][3], np.float32)[0] for found in answers] == list(range(20))


async def test_a_triton_that_has_gone_is_unavailable(echo, until):
    await until_quick(echo)
    echo.went.clear()
    call = asyncio.create_task(echo.ask(request(HALF_A_MINUTE), timeout_s=PATIENCE_S))
    await until(lambda: echo.went == ["http"])
    await echo.running.process.stop(grace_s=0)
    with pytest.raises(Unavailable):
        await call
    with pytest.raises(Unavailable):
        await echo.ask(request(1.0))


# What no Triton does on demand, by a server that answers with what it is told to.

Script = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, script: Script) -> AsyncIterator[list[int]]:
    """Yield the number of requests on each connection."""
    counts: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at = len(counts)
        counts.append(0)
        try:
            while word := await reader.readexactly(4):
                counts[at] += 1
                await script(word, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield counts
    finally:
        server.close()  # and no more: whoever waited for it would wait for the connections that are kept


def answer(body: bytes, json_size: int | None = None, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n" % len(body)
    if json_size is not None:
        head += b"Inference-Header-Content-Length: %d\r\n" % json_size
    return head + b"\r\n" + body


@pytest.fixture
async def calls(tmp_path) -> AsyncIterator[HttpCalls]:
    found = HttpCalls(str(tmp_path / "http"))
    yield found
    found.close()


async def test_answers_in_pieces_of_any_size(calls, tmp_path):
    body = b'{"a":1}' + bytes(range(256)) * 400

    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        step, whole = int(word), answer(body, 7)
        for at in range(0, min(len(whole), 200 * step), step):
            writer.write(whole[at : at + step])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(whole[200 * step :])

    async with serving(tmp_path / "http", script) as counts:
        for step in (b"0001", b"0007", b"0071", b"9999"):
            found = await calls.call(step, 10)
            assert found.head == b'{"a":1}'
            assert bytes(found.data) == body[7:]
        assert counts == [4], "over one connection"


async def test_calls_at_the_same_time_have_connections_of_their_own(calls, tmp_path):
    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05 - int(word) / 1000)
        writer.write(answer(word, 4))

    async with serving(tmp_path / "http", script) as counts:
        for _ in range(3):
            words = [b"%04d" % n for n in range(10)]
            found = await asyncio.gather(*(calls.call(word, 10) for word in words))
            assert [each.head for each in found] == words
        assert counts == [3] * 10


async def test_an_idle_connection_that_the_server_closed_is_not_used(calls, tmp_path):
    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(word, 4))
        await writer.drain()
        writer.close()

    async with serving(tmp_path / "http", script) as counts:
        for _ in range(3):
            assert (await calls.call(b"word", 10)).head == b"word"
            while calls._idle:
                await asyncio.sleep(0.001)
        assert counts == [1, 1, 1]
        assert not calls._all


async def test_a_connection_that_ends_under_a_request_and_one_that_says_it_is_over(calls, tmp_path):
    """The request may have run, so it is not sent again."""

    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        if word == b"last":
            writer.close()
        else:
            writer.write(answer(word, 4, b"200 OK\r\nConnection: close" if word == b"bye!" else b"200 OK"))

    async with serving(tmp_path / "http", script) as counts:
        await calls.call(b"word", 10)
        for _ in range(2):
            with pytest.raises(ConnectionEnded):
                await calls.call(b"last", 10)
        await calls.call(b"bye!", 10)
        assert not calls._idle, "it said so"
        assert counts == [2, 1, 1]


@pytest.mark.parametrize(
    ("sent", "code", "words"),
    [
        (answer(b'{"error":"no such input"}', status=b"400 Bad Request"), 3, "no such input"),
        (answer(b"something else", status=b"503 Unavailable"), 13, "something else"),
        (answer(b"", status=b"500 Internal Server Error"), 13, "HTTP status 500"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 13, "cannot be read"),
        (b"anything\r\n\r\n", 13, "cannot be read"),
    ],
)
async def test_other_answers_are_failures(calls, tmp_path, sent, code, words):
    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)

    async with serving(tmp_path / "http", script):
        with pytest.raises(CallFailed, match=words) as failed:
            await calls.call(b"word", 10)
        assert failed.value.code == code


async def test_nobody_there_and_a_server_that_goes(calls, tmp_path):
    with pytest.raises(NotListening):
        await calls.call(b"word", 10)

    async def script(word: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"half of it" * 10)[:-5])
        await writer.drain()
        writer.close()

    async with serving(tmp_path / "http", script):
        with pytest.raises(ConnectionEnded):
            await calls.call(b"word", 10)
        assert not calls._idle
