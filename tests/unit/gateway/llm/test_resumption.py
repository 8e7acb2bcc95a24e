"""Streams whose worker was lost."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.gateway.domain.llm.resumption import KEPT_BYTES, StreamProgress, obstacle
from tidegate.kernel.protocol.llm import Meta, Resume

pytestmark = pytest.mark.unit

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chunk(content: str = "", finish: str | None = None, **fields: Any) -> bytes:
    delta = {"content": content, **fields.pop("delta", {})}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return orjson.dumps({"id": "c1", "created": 7, "model": "m", "choices": [choice], **fields})


def progress(**body: Any) -> StreamProgress:
    return StreamProgress(CHAT, {"stream": True, **body})


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (CHAT, {}, ""),
        (CHAT, {"n": 1, "response_format": {"type": "text"}, "tools": [], "logprobs": False}, ""),
        (TEXT, {"prompt": ["a"]}, ""),
        (TEXT, {"prompt": [1, 2, 3]}, ""),
        (TEXT, {"prompt": ["a", "b"]}, "several answers"),
        (TEXT, {"prompt": [[1], [2]]}, "several answers"),
        (CHAT, {"n": 2}, "several answers"),
        (CHAT, {"response_format": {"type": "json_object"}}, "guided decoding"),
        (CHAT, {"guided_regex": "a+"}, "guided decoding"),
        (CHAT, {"structured_outputs": {"choice": ["a"]}}, "guided decoding"),
        (CHAT, {"tools": [{}]}, "tools"),
        (CHAT, {"logprobs": True}, "log probabilities"),
        (TEXT, {"logprobs": 0}, "log probabilities"),
        (TEXT, {"echo": True}, "an echo of its prompt"),
        (CHAT, {"presence_penalty": 0.5}, "penalties"),
        ("/v1/responses", {}, "events of /v1/responses"),
    ],
)
def test_obstacles(path, body, word):
    found = obstacle(path, body)
    assert found.startswith(word)
    assert bool(found) is bool(word)


def test_a_stream_without_events_starts_again():
    found = progress(n=2)
    assert found.after_loss().action == "continue"
    assert found.resume() is None


def test_a_stream_continues_after_the_tokens_that_its_caller_has():
    found = progress()
    found.add([chunk("", delta={"role": "assistant"})], Meta(prompt_ids=[1, 2]))
    found.add([chunk("a"), chunk("b")], Meta(ids=[3, 4]))
    assert found.after_loss().action == "continue"
    assert found.resume() == Resume([1, 2], [3, 4], "ab", "c1", 7)
    found.add([chunk("c")], Meta(prompt_ids=[1, 2, 3, 4], ids=[5]))
    assert found.resume() == Resume([1, 2], [3, 4, 5], "abc", "c1", 7)


def test_events_are_parsed_when_many_are_kept():
    found = progress()
    count = KEPT_BYTES // 50
    for at in range(count):
        found.add([chunk("x")], Meta(prompt_ids=[1], ids=[at]))
    resume = found.resume()
    assert resume is not None
    assert (resume.text, len(resume.emitted)) == ("x" * count, count)


def test_an_obstacle_fails_the_stream_once_it_has_begun():
    found = progress(tools=[{}])
    found.add([chunk("a")], Meta(prompt_ids=[1], ids=[2]))
    assert found.after_loss() == ("fail", "it has tools")


def test_without_ids_a_stream_fails():
    found = progress()
    found.add([chunk("a")], Meta())
    assert found.after_loss() == ("fail", "the engine does not report the ids of its tokens")


@pytest.mark.parametrize("name", ["reasoning_content", "tool_calls"])
def test_other_content_than_text_fails_the_stream(name):
    found = progress()
    found.add([chunk("a", delta={name: "x"})], Meta(prompt_ids=[1], ids=[2]))
    assert found.after_loss() == ("fail", "it has more than text")


def test_a_stream_whose_end_was_lost_has_ended():
    found = progress(n=2)
    found.add([chunk("a", "stop")], Meta(usage=(3, 1, 2)))
    assert found.after_loss().action == "end"
    (last,) = map(orjson.loads, found.last_events())
    assert (last["id"], last["choices"]) == ("c1", [])
    assert last["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip
    found.add([orjson.dumps({"choices": [], "usage": {"total_tokens": 4}})], Meta())
    assert found.after_loss().action == "end"
    assert found.last_events() == []


def test_a_whole_answer_whose_end_was_lost_has_ended():
    found = StreamProgress("/v1/embeddings", {})
    found.add([b"{}"], Meta(usage=(3, 0, 0)))
    assert found.after_loss().action == "end"
    assert found.last_events() == []


def test_events_of_a_continuation_are_those_of_the_first_part():
    found = progress()
    found.add([chunk("a", id="first", created=1)], Meta(prompt_ids=[1], ids=[2]))
    found.resume()
    assert found.aligned(chunk("", id="second", delta={"role": "assistant"})) is None
    aligned = orjson.loads(found.aligned(chunk("b", id="second", delta={"role": "assistant"})) or b"")
    assert (aligned["id"], aligned["created"]) == ("first", 1)
    assert aligned["choices"][0]["delta"] == {"content": "b"}
    last = orjson.loads(found.aligned(chunk("", "stop", id="second")) or b"")
    assert last["choices"][0]["finish_reason"] == "stop"


def test_a_deployment_whose_requests_may_not_run_twice():
    found = progress()
    assert found.after_loss(retry_safe=False) == ("fail", "its Deployment has `retry: never`")
    found.add([chunk("a")], Meta(prompt_ids=[1], ids=[2], usage=(1, 1, 0)))
    assert found.after_loss(retry_safe=False).action == "fail"
    assert found.after_loss().action == "continue"
    found.add([chunk("b", "stop")], Meta(ids=[3]))
    assert found.after_loss(retry_safe=False).action == "end", "only its end was lost"
