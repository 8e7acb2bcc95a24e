"""The one answer that the events of a stream make together."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.unit

USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}


@pytest.fixture(scope="module")
def whole(llm_module) -> ModuleType:
    return llm_module("llamacpp_whole")


def delta(reason: str | None = None, **members: Any) -> dict[str, Any]:
    return {"index": 0, "delta": members, "finish_reason": reason}


def joined(whole: ModuleType, *events: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    answer = whole.WholeAnswer()
    for event in events:
        answer.add(json.dumps(event))
    (body,), meta = answer.emission()
    return json.loads(body), meta


def test_a_chat_has_its_texts_its_reason_and_its_usage(whole):
    head = {"id": "x", "object": "chat.completion.chunk", "created": 3}
    found, meta = joined(
        whole,
        {**head, "choices": [delta(role="assistant", content=None)], "prompt_progress": {"total": 5}},
        {**head, "choices": [delta(reasoning_content="hm")]},
        {**head, "choices": [delta(content="ü")]},
        {**head, "choices": [delta(content="!")]},
        {**head, "choices": [delta("length")]},
        {**head, "choices": [], "usage": USAGE, "timings": {"prompt_n": 4}},
    )
    message = {"role": "assistant", "content": "ü!", "reasoning_content": "hm"}
    assert found == {
        **head, "object": "chat.completion", "usage": USAGE, "timings": {"prompt_n": 4},
        "choices": [{"finish_reason": "length", "index": 0, "message": message}],
    }  # fmt: skip
    assert meta == {"usage": [5, 2, 1]}


def test_a_completion_keeps_its_form(whole):
    def choice(text: str, reason: str | None = None) -> dict[str, Any]:
        return {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}

    head = {"id": "x", "object": "text_completion"}
    found, _ = joined(
        whole,
        {**head, "choices": [choice("a")]},
        {**head, "choices": [choice(" b")]},
        {**head, "choices": [choice("", "stop")], "usage": USAGE},
    )
    assert found == {**head, "usage": USAGE, "choices": [choice("a b", "stop")]}


def test_an_error_is_the_whole_answer(whole):
    error = {"error": {"code": 400, "message": "too long"}}
    head = {"id": "x", "object": "chat.completion.chunk"}
    assert joined(whole, {**head, "choices": [delta(content="a")]}, error) == (error, {"status": 400})


@pytest.mark.parametrize(
    ("body", "joinable"),
    [
        ({"messages": []}, True),
        ({"messages": [], "response_format": {"type": "json_object"}, "tools": [], "n": 1}, True),
        ({"prompt": [1, 2]}, True),
        ({"prompt": ["a", "b"]}, False),
        ({"messages": [], "tools": [{}]}, False),
        ({"messages": [], "logprobs": True}, False),
        ({"messages": [], "n": 2}, False),
    ],
)
def test_answers_with_more_than_one_text_are_the_engines(whole, body: dict[str, Any], joinable: bool):
    assert whole.can_join(body) is joinable
