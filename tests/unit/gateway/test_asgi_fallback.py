"""The ASGI fallback for inference: headers, bodies, and errors of failed replies."""

from __future__ import annotations

import asyncio
import gzip

import orjson
import pytest

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.inference.asgi_fallback import AsgiFallback
from services.gateway.api.inference.handler import InferenceHandler, parse_header_length
from services.gateway.api.inference.request_target import Infer
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.application.access import Access
from services.gateway.application.feedback import FeedbackTags
from services.gateway.application.inference.core import Timing, failure, parse_timeout
from services.gateway.domain.feedback_ids import FeedbackIds
from services.gateway.domain.memory_budget import MemoryBudget
from tidegate.kernel.errors import (
    BY_REASON,
    BadRequest,
    DeadlinePassed,
    ModelFailed,
)
from tidegate.kernel.protocol import envelope

pytestmark = pytest.mark.unit

DIGITS = Infer("digits", "")
BODY = b'{"inputs": []}' * 100


@pytest.mark.parametrize(
    ("raw", "value"), [(None, None), (b"1", 1.0), (b"250.5", 250.5), (b"86400000", 864e5)]
)
def test_timeout(raw, value):
    assert parse_timeout(raw) == value


@pytest.mark.parametrize("raw", [b"", b"0", b"0.9", b"-5", b"86400001", b"inf", b"nan", b"1s", b"\xff"])
def test_wrong_timeout(raw):
    with pytest.raises(BadRequest) as caught:
        parse_timeout(raw)
    assert caught.value.message.startswith("X-Request-Timeout-Ms must be 1..86400000 milliseconds, got ")


def test_header_length():
    assert parse_header_length({}) is None
    assert parse_header_length({b"inference-header-content-length": b"12"}) == 12


@pytest.mark.parametrize("raw", [b"", b"-1", b"1.5", b"x", b"\xb2", b"1" * 5000, b"0" * 5000])
def test_wrong_header_length(raw):
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length must be a number of bytes"):
        parse_header_length({b"inference-header-content-length": raw})


@pytest.mark.parametrize("reason", BY_REASON)
def test_a_failed_reply_is_its_error(reason):
    found = failure(envelope.read_reply(envelope.failure_frame(bytes(16), 0, reason, "told")))
    assert (type(found), found.message, found.reason) == (BY_REASON[reason], "told", reason)


def test_an_unknown_reason_becomes_model_failed():
    found = failure(envelope.read_reply(envelope.failure_frame(bytes(16), 0, "out_of_tea", "told")))
    assert (type(found), found.reason) == (ModelFailed, "out_of_tea")


def test_transit_is_what_remains():
    timing = Timing(decode=0.1, wait=0.2, compute=0.3, encode=0.1)
    assert timing.transit(1.0) == pytest.approx(0.3)
    assert timing.transit(0.1) == 0.0


class Caller:
    """An ASGI caller that sends the given messages and keeps the response."""

    def __init__(self, *messages, headers=(), path="/v2/models/digits/infer", method="POST"):
        self.messages = list(messages)
        told = [(b"host", b"localhost"), *headers]
        self.scope = {"type": "http", "method": method, "path": path, "headers": told}
        self.sent: list = []

    async def receive(self):
        return self.messages.pop(0)

    async def send(self, message):
        self.sent.append(message)

    @property
    def status(self) -> int:
        found: int = self.sent[0]["status"]
        return found


class Refuses:
    """A core that fails with ``error``, at once or later (``later``)."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.feedback = FeedbackTags(FeedbackIds(""))
        self.error: Exception = DeadlinePassed("late", retry_after_s=0.2)
        self.later = False
        self.abandoned: list[bytes] = []
        self.done = None

    def begin(self, model, version, timeout_ms, decode, trace, done, origin=None, caller=None):
        self.asked.append((model, version))
        self.done = done
        if self.later:
            return b"id"
        raise self.error

    def abandon(self, id_):
        self.abandoned.append(id_)


async def elsewhere(scope, receive, send):
    await send({"type": "http.response.start", "status": 299, "headers": []})


def body(chunk: bytes, *, more: bool = False):
    return {"type": "http.request", "body": chunk, "more_body": more}


@pytest.fixture
def core():
    return Refuses()


@pytest.fixture
def fallback(core):
    limits = BodyLimits(body_bytes=10, json_bytes=10, bodies=MemoryBudget(1000), answers=MemoryBudget(1000))
    access = Access(required=False, service_token="", count=lambda *_: [0] * 7, limiters={})
    inference = InferenceHandler(
        core, access=access, limits=limits, local_only=True, metrics=GatewayMetrics()
    )
    return AsgiFallback(elsewhere, inference)


async def call(fallback, caller: Caller) -> Caller:
    await fallback(caller.scope, caller.receive, caller.send)
    return caller


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v2/models/digits/infer", ("digits", "")),
        ("/v2/models/digits/versions/3/infer", ("digits", "3")),
        ("/v2/models//infer", ("", "")),
    ],
)
async def test_model_and_version_come_from_the_path(fallback, core, path, asked):
    caller = await call(fallback, Caller(body(b"{}"), path=path))
    assert core.asked == [asked]
    assert caller.status == 504
    headers = dict(caller.sent[0]["headers"])
    assert headers[b"retry-after"] == b"1"
    assert len(headers[b"x-request-id"]) == 16


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v2/models/digits/infer", "GET"),
        ("/v2/models/digits", "POST"),
        ("/v2/models/digits/infer//", "POST"),
        ("/health/live", "GET"),
    ],
)
async def test_other_requests_go_to_the_app(fallback, core, path, method):
    caller = await call(fallback, Caller(path=path, method=method))
    assert (caller.status, core.asked) == (299, [])


async def test_a_foreign_page_is_refused(fallback, core):
    caller = await call(fallback, Caller(body(b"{}"), headers=[(b"origin", b"http://evil.example")]))
    assert (caller.status, core.asked) == (403, [])


@pytest.mark.parametrize(
    ("messages", "headers"),
    [
        ([body(b"x" * 11)], []),
        ([body(b"x" * 6, more=True), body(b"x" * 5)], []),
        ([body(b"x" * 6, more=True), body(b"x" * 6, more=True)], []),
    ],
    ids=["in one piece", "in two pieces", "without an end"],
)
async def test_too_large(fallback, core, messages, headers):
    caller = await call(fallback, Caller(*messages, headers=headers))
    assert (caller.status, core.asked) == (413, [])


async def test_a_body_at_the_limit_is_accepted(fallback, core):
    caller = await call(fallback, Caller(body(b"x" * 5, more=True), body(b"x" * 5)))
    assert (caller.status, len(core.asked)) == (504, 1)


@pytest.mark.parametrize(
    "messages",
    [[{"type": "http.disconnect"}], [body(b"x", more=True), {"type": "http.disconnect"}]],
)
async def test_a_caller_that_disconnects_during_its_body(fallback, core, messages):
    caller = await call(fallback, Caller(*messages))
    assert (caller.sent, core.asked) == ([], [])


async def test_an_error_after_the_request_was_queued(fallback, core):
    core.later = True
    caller = Caller(body(b"{}"))
    under_way = asyncio.create_task(call(fallback, caller))
    await asyncio.sleep(0)
    assert caller.sent == []
    core.done(core.error)
    await under_way
    assert caller.status == 504


async def test_a_caller_that_disconnects_before_the_answer(fallback, core):
    core.later = True
    under_way = asyncio.create_task(call(fallback, Caller(body(b"{}"))))
    await asyncio.sleep(0)
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    assert core.abandoned == [b"id"]
    core.done(core.error)


async def test_an_unexpected_exception_is_an_internal_error(fallback, core, caplog):
    core.error = RuntimeError("the details are for the log")
    caller = await call(fallback, Caller(body(b"{}"), headers=[(b"x-request-id", b"abc")]))
    assert caller.status == 500
    answer = orjson.loads(caller.sent[1]["body"])
    assert (answer["reason"], answer["request_id"]) == ("internal", "abc")
    assert "details" not in answer["error"]
    assert "the details are for the log" in caplog.text


@pytest.mark.parametrize("gone", [False, True])
def test_memory_of_a_decompressed_body_is_released_once(fallback, core, gone):
    """The caller may disconnect while a thread still compresses the response."""
    core.later = True
    inference = fallback._inference
    answers: list[object] = []
    headers = {b"host": b"localhost", b"content-encoding": b"gzip"}
    assert inference.begin(DIGITS, headers, gzip.compress(b"{}"), answers.append) == b"id"
    assert inference.limits.bodies.used == 2
    if gone:
        inference.abandon(b"id", DIGITS, headers)
        assert inference.limits.bodies.used == 0
    core.done(core.error)
    assert (inference.limits.bodies.used, len(answers)) == (0, 1)


async def test_the_first_call_of_a_credential_reclaims_memory_as_a_known_caller(core):
    bodies = MemoryBudget(1000)
    limits = BodyLimits(body_bytes=10, json_bytes=10, bodies=bodies, answers=MemoryBudget(1000))
    access = Access(required=False, service_token="secret", count=lambda *_: [0] * 7, limiters={})
    inference = InferenceHandler(
        core, access=access, limits=limits, local_only=True, metrics=GatewayMetrics()
    )
    asked: list[bool] = []
    bodies.reclaim = lambda _, for_known: asked.append(for_known)
    caller = Caller(body(b"{}"), headers=[(b"authorization", b"Bearer secret")])
    receive = caller.receive

    async def full():
        bodies.force(1000)
        return await receive()

    caller.receive = full  # type: ignore[method-assign]
    await call(AsgiFallback(elsewhere, inference), caller)
    assert caller.status == 503
    assert asked == [True]
