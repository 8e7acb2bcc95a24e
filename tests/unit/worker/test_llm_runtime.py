"""The parts of the language models' runtime that need no engine."""

from __future__ import annotations

import enum
import json
import sys
import threading
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def calls(llm_module) -> ModuleType:
    return llm_module("calls")


@pytest.fixture(scope="module")
def events(llm_module) -> ModuleType:
    return llm_module("llamacpp_events")


@pytest.fixture(scope="module")
def settings(llm_module) -> ModuleType:
    return llm_module("llamacpp_settings")


# --- calls -----------------------------------------------------------------------------------------------


def test_events_that_are_ready_together_are_taken_together(calls):
    call = calls.Call()
    call.emit([b"a"], {"usage": [5, 1, 0], "prompt_ids": [1, 2], "ids": [7]})
    call.emit([b"b", b"c"], {"usage": [5, 3, 0], "ids": [8, 9]})
    meta = {"usage": [5, 3, 0], "prompt_ids": [1, 2], "ids": [7, 8, 9]}
    assert call.take(0) == ([b"a", b"b", b"c"], meta, False)
    assert call.take(0) == ([], {}, False)
    call.emit([b"d"], {})
    call.end()
    assert call.take(0) == ([b"d"], {}, True)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "input_image", "image_url": "HTTPS://intranet/secret.png"},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    ],
)
@pytest.mark.parametrize("place", ["messages", "input"])
def test_an_address_of_an_image_is_refused(calls, part: dict[str, Any], place: str, llm_module):
    media = llm_module("media")
    with pytest.raises(calls.Refused, match="send the data itself") as refused:
        media.check_media({place: [{"role": "user", "content": [{"type": "text", "text": "?"}, part]}]})
    assert refused.value.status == 400


def test_data_and_words_about_addresses_are_accepted(llm_module):
    media = llm_module("media")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
    words = {"type": "text", "text": "image_url: http://example.com"}
    media.check_media({"messages": [{"role": "user", "content": [image, words]}], "tools": [{"url": "x"}]})
    media.check_media({"prompt": "http://example.com", "input": None})


@pytest.mark.parametrize(
    ("engine", "arguments", "expected"),
    [
        ("llamacpp", {}, False),
        ("vllm", {}, False),
        ("vllm", {"allowed_media_domains": "images.example.com"}, True),
        ("openai-url", {}, True),
    ],
)
def test_only_upstreams_and_engines_with_a_list_of_domains_fetch(
    llm_module, engine: str, arguments: dict[str, Any], expected: bool
):
    media = llm_module("media")
    assert media.may_fetch({"engine": engine, "arguments": arguments}) is expected


def test_a_tally_counts_slots_and_tokens(calls, llm_module):
    tally = llm_module("tally").Tally({"slots": 1, "kv_total": 64})
    slots, first, second = threading.BoundedSemaphore(1), calls.Call(), calls.Call()
    inside, leave = threading.Event(), threading.Event()

    def run(call: Any) -> None:
        with tally.slot(call, slots):
            call.emit([b"a"], {"usage": [5, 1, 4]})
            call.emit([b"b"], {"usage": [5, 3, 4]})
            inside.set()
            assert leave.wait(60)

    threads = [threading.Thread(target=run, args=(call,)) for call in (first, second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    while not tally.stats()["waiting"]:
        threading.Event().wait(0.001)
    known = {"slots": 1, "kv_total": 64, "running": 1, "waiting": 1, "kv_used": 8}
    assert tally.stats() == known | {"prompt_tokens": 5, "answer_tokens": 3, "cached_tokens": 4}
    leave.set()
    for thread in threads:
        thread.join()
    known = {"slots": 1, "kv_total": 64, "running": 0, "waiting": 0, "kv_used": 0}
    assert tally.stats() == known | {"prompt_tokens": 10, "answer_tokens": 6, "cached_tokens": 8}


def test_a_call_with_counts_that_are_no_numbers_frees_its_slot(calls, llm_module):
    tally = llm_module("tally").Tally({"slots": 1})
    slots, call = threading.BoundedSemaphore(1), calls.Call()
    with pytest.raises(TypeError), tally.slot(call, slots):
        call.emit([b"a"], {"usage": [None, 1, 0]})
    assert slots.acquire(blocking=False)


def test_a_taker_wakes_up_for_an_event(calls):
    call = calls.Call()
    threading.Timer(0.01, call.emit, [[b"a"], {}]).start()
    assert call.take(60) == ([b"a"], {}, False)


def test_cancelling_runs_each_action_once(calls):
    call, ran = calls.Call(), []
    call.on_cancel(lambda: ran.append(1))
    call.on_cancel(lambda: 1 / 0)  # an action that fails does not stop the others
    call.on_cancel(lambda: ran.append(2))
    assert not call.cancelled
    call.cancel()
    call.cancel()
    assert call.cancelled
    call.on_cancel(lambda: ran.append(3))
    assert ran == [1, 2, 3]


def test_a_refusal_has_the_shape_of_openais_errors(calls):
    body = json.loads(calls.Refused(404, "no such path", code="unknown_path").body())
    error = {
        "message": "no such path",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_path",
    }
    assert body == {"error": error}


# --- events of llama.cpp ---------------------------------------------------------------------------------

TIMINGS = {"cache_n": 30, "prompt_n": 2, "predicted_n": 5, "predicted_ms": 1.0}
USAGE = {"prompt_tokens": 32, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 30}}


def chunk(**more: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": "ü"}}], "id": "x", **more})


def test_a_stream_is_asked_for_counts_and_keeps_the_callers_options(events):
    body = {"messages": [], "stream": True, "stream_options": {"other": 1}}
    asked = events.with_counts(body)
    assert asked["stream_options"] == {"other": 1, "include_usage": True}
    assert asked["timings_per_token"] is asked["return_progress"] is True
    assert "timings_per_token" not in body


def test_usage_is_cumulative_and_the_added_counts_are_removed(events):
    stream = events.StreamEvents({})
    kept, meta = stream.read(chunk(timings=TIMINGS))
    assert meta == {"usage": [32, 5, 30]}
    assert json.loads(kept[0]) == json.loads(chunk())
    assert "ü".encode() in kept[0]
    last = chunk(usage=USAGE, timings=TIMINGS)
    assert stream.read(last) == ([last.encode()], {"usage": [32, 6, 30]})
    assert stream.read(chunk(prompt_progress={"total": 9})) == ([], {})
    assert stream.read(chunk()) == ([chunk().encode()], {})


def test_what_the_caller_asked_for_is_kept(events):
    stream = events.StreamEvents({"timings_per_token": True, "return_progress": True})
    for text in (chunk(timings=TIMINGS), chunk(prompt_progress={"total": 9})):
        assert stream.read(text)[0] == [text.encode()]


def test_an_error_event_has_its_status(events):
    text = json.dumps({"error": {"code": 400, "message": "too long"}})
    assert events.StreamEvents({}).read(text) == ([text.encode()], {"status": 400})


def test_usage_in_both_shapes(events):
    assert events.usage_of({"usage": USAGE}) == [32, 6, 30]
    spent = {"input_tokens": 3, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 1}}
    assert events.usage_of({"response": {"usage": spent}}) == [3, 4, 1]
    assert events.usage_of({"usage": {"prompt_tokens": 7}}) == [7, 0, 0]
    assert events.usage_of({"usage": None}) is None


# --- arguments of llama.cpp ------------------------------------------------------------------------------


class Kind(enum.IntEnum):
    TYPE_F16 = 1
    TYPE_Q8_0 = 8


class Sampling:
    temp = 0.8


class Params:
    """Stands for ``CommonParams``, which needs the package."""

    n_batch = 2048
    warmup = True
    rope_freq_base = 0.0
    chat_template = ""
    cache_type_k = Kind.TYPE_F16
    n_parallel = 1

    def __init__(self) -> None:
        self.sampling = Sampling()
        self.tags: set[str] = set()


def test_arguments_get_the_type_of_the_parameter(settings):
    params = Params()
    given = {
        "n_batch": 256, "warmup": False, "rope_freq_base": 5, "chat_template": 3, "cache_type_k": "q8_0",
        "sampling.temp": 0, "tags": "a,b",
    }  # fmt: skip
    for name, value in given.items():
        settings.assign(params, name, value)
    assert (params.n_batch, params.warmup, params.rope_freq_base, params.chat_template) == (
        256,
        False,
        5.0,
        "3",
    )
    assert (params.cache_type_k, params.sampling.temp, params.tags) == (Kind.TYPE_Q8_0, 0.0, {"a", "b"})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("n_bach", 1, "no argument 'n_bach'. Did you mean n_batch"),
        ("temp", 1, r"Did you mean .*sampling\.temp"),
        ("sampling.nothing", 1, "no argument"),
        ("__class__", 1, "no argument"),
        ("n_parallel", 2, "set by --slots"),
        ("warmup", "perhaps", "expected true or false"),
        ("cache_type_k", "q9", "expected one of TYPE_F16, TYPE_Q8_0"),
        ("rope_freq_base", "x", "does not fit its type float"),
    ],
)
def test_other_arguments_are_refused(settings, name: str, value: Any, says: str):
    with pytest.raises(ValueError, match=says):
        settings.assign(Params(), name, value)


# --- the model ---------------------------------------------------------------------------------------------


def test_a_sender_that_fails_ends_the_engines_call_and_frees_its_slot(calls, monkeypatch, llm_module):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("pb_utils"))
    model = llm_module("model")
    cancelled = threading.Event()

    class Sender:
        def is_cancelled(self) -> bool:
            return False

        def send(self, response: Any) -> None:
            raise ValueError("Triton takes no answer")

    class Engine:
        def call(self, path: str, body: dict, resume: None, call: Any) -> None:
            call.on_cancel(cancelled.set)
            call.emit([b"a"], {})
            assert cancelled.wait(60)

    served = model.TritonPythonModel()
    served._engine, served._slots, served._may_fetch = Engine(), threading.BoundedSemaphore(1), False
    served._tally = llm_module("tally").Tally({"slots": 1})
    monkeypatch.setattr(model, "_response", lambda events, meta: events)
    with pytest.raises(ValueError, match="takes no answer"):
        served._relay(Sender(), {"path": "/v1/completions", "body": {}})
    assert cancelled.is_set()
    assert served._slots.acquire(timeout=60)
