"""Ids of tokens in llama.cpp's events, and the continuation of a stream that another replica began."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.unit

WORDS = {"a": [1], " b": [2], "🦊": [7, 8, 9], " stop": [5], " s": [6]}


@pytest.fixture(scope="module")
def events(llm_module) -> ModuleType:
    return llm_module("llamacpp_events")


@pytest.fixture(scope="module")
def resume(llm_module) -> ModuleType:
    return llm_module("llamacpp_resume")


def entry(text: str, last: int) -> dict[str, Any]:
    return {"content": [{"id": last, "token": text, "bytes": list(text.encode()), "logprob": -0.1}]}


def timings(count: int) -> dict[str, Any]:
    return {"cache_n": 3, "prompt_n": 1, "predicted_n": count}


def chat(text: str, count: int, last: int, **delta: Any) -> str:
    choice = {
        "index": 0,
        "delta": {"content": text, **delta},
        "logprobs": entry(text, last),
        "finish_reason": None,
    }
    return json.dumps({"choices": [choice], "id": "x", "timings": timings(count)})


def completion(text: str, count: int, last: int | None, reason: str | None = None, **more: Any) -> str:
    logprobs = None if last is None else entry(text, last)
    choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
    event = {
        "choices": [choice],
        "created": 9,
        "model": "m",
        "object": "text_completion",
        "id": "new",
        **more,
    }
    return json.dumps(event | {"timings": timings(count)})


def stream(events: ModuleType, **body: Any) -> Any:
    return events.StreamEvents(body, lambda text: WORDS.get(text, []))


# --- ids -------------------------------------------------------------------------------------------------


def test_ids_are_asked_for_in_the_form_of_each_path(events):
    assert events.with_counts({"messages": []}, ids=True)["top_logprobs"] == 1
    assert events.with_counts({"prompt": "a"}, ids=True)["logprobs"] == 1


def test_each_token_has_its_id_and_no_log_probabilities_are_left(events):
    read = stream(events).read
    kept, meta = read(chat("a", 1, 1))
    assert meta == {"usage": [4, 1, 3], "ids": [1]}
    plain = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}], "id": "x"}
    assert json.loads(kept[0]) == plain
    assert read(chat("🦊", 4, 9))[1]["ids"] == [7, 8, 9]
    kept, meta = stream(events).read(completion("a", 1, 1))
    assert meta["ids"] == [1]
    assert json.loads(kept[0])["choices"] == [
        {"text": "a", "index": 0, "logprobs": None, "finish_reason": None}
    ]


def test_a_space_that_the_tokenizer_adds_is_left_out(events):
    spaced = events.StreamEvents({}, lambda _: [99, 7, 8, 9])
    assert spaced.read(chat("🦊", 3, 9))[1]["ids"] == [7, 8, 9]


@pytest.mark.parametrize(
    "unknown",
    [
        chat("??", 3, 2),  # three tokens that the tokenizer does not know
        chat("🦊", 3, 4),  # other tokens than the tokenizer's
        chat("a", 1, 1, tool_calls=[]),  # the text is in another member than the content
    ],
)
def test_after_tokens_that_are_not_known_no_ids_follow(events, unknown: str):
    read = stream(events).read
    kept, meta = read(unknown)
    assert "ids" not in meta
    assert "ids" not in read(chat(" b", 5, 2))[1]
    assert "logprobs" not in json.loads(kept[0])["choices"][0]


def test_with_stop_texts_a_part_of_a_token_has_no_id(events):
    read = stream(events, stop=["top"]).read
    assert read(chat("a", 1, 1))[1]["ids"] == [1]
    # The token was " stop", and "top" is the stop text.
    assert "ids" not in read(chat(" s", 2, 5))[1]


# --- continuation ----------------------------------------------------------------------------------------

RESUME = {"prompt": [10, 11, 12], "emitted": [1, 2], "text": "a b", "id": "old", "created": 5}


@pytest.mark.parametrize(
    ("body", "possible"),
    [
        ({"messages": []}, True),
        ({"messages": [], "n": 1, "tools": [], "stop": ["x"], "temperature": 0}, True),
        ({"prompt": "a"}, True),
        ({"prompt": [1, 2]}, True),
        ({"prompt": ["a", "b"]}, False),
        ({"messages": [], "n": 2}, False),
        ({"messages": [], "tools": [{}]}, False),
        ({"messages": [], "response_format": {"type": "json_object"}}, False),
        ({"messages": [], "logprobs": True}, False),
        ({"prompt": "a", "echo": True}, False),
    ],
)
def test_what_can_be_continued(resume, body: dict[str, Any], possible: bool):
    assert resume.can_continue(body) is possible


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({}, None),
        ({"max_tokens": 10}, 8),
        ({"max_completion_tokens": 2, "max_tokens": 9}, 0),
        ({"max_tokens": -1}, None),
    ],
)
def test_the_engine_continues_after_the_emitted_tokens(resume, limits: dict[str, int], left: int | None):
    body = {"messages": [1], "temperature": 0, "chat_template_kwargs": {}, "stop": ["x"], **limits}
    asked = {"prompt": [10, 11, 12, 1, 2], "stream": True, "temperature": 0, "stop": ["x"]}
    assert resume.continuation(body, RESUME) == asked | ({} if left is None else {"max_tokens": left})


def choices(kept: list[bytes]) -> list[Any]:
    return [json.loads(event)["choices"] for event in kept]


def test_a_continued_chat_has_the_form_and_the_counts_of_the_whole(resume):
    read = resume.ResumedEvents({"messages": []}, RESUME, lambda text: WORDS[text], "m").read
    kept, meta = read(completion(" b", 1, 2))
    assert meta == {"usage": [3, 3, 3], "ids": [2]}
    (event,) = map(json.loads, kept)
    assert event == {
        "choices": [{"finish_reason": None, "index": 0, "delta": {"content": " b"}}], "created": 5,
        "model": "m", "object": "chat.completion.chunk", "id": "old",
    }  # fmt: skip
    assert read(json.dumps({"choices": [], "prompt_progress": {}})) == ([], {})
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
    kept, meta = read(completion("", 2, None, "stop", usage=usage))
    assert choices(kept) == [[{"finish_reason": "stop", "index": 0, "delta": {}}], []]
    assert meta["usage"] == [3, 4, 1]
    whole = {
        "completion_tokens": 4,
        "prompt_tokens": 3,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert json.loads(kept[1])["usage"] == whole
    assert not {"usage", "timings"} & json.loads(kept[0]).keys()


def test_a_continued_completion_keeps_its_form(resume):
    read = resume.ResumedEvents({"prompt": "a"}, RESUME, lambda text: WORDS[text], "m").read
    kept, _ = read(completion("a", 1, 1))
    event = json.loads(kept[0])
    assert (event["id"], event["created"], event["object"]) == ("old", 5, "text_completion")
    assert event["choices"] == [{"text": "a", "index": 0, "logprobs": None, "finish_reason": None}]


@pytest.mark.parametrize("body", [{"messages": []}, {"prompt": "a"}])
def test_a_stream_without_tokens_left_only_ends(resume, body: dict[str, Any]):
    kept, meta = resume.ResumedEvents(body, RESUME, lambda _: [], "m").finished()
    assert meta == {"usage": [3, 2, 0]}
    events = [json.loads(event) for event in kept]
    assert [choice["finish_reason"] for event in events for choice in event["choices"]] == ["length"]
    assert events[-1]["usage"]["total_tokens"] == 5
    assert {event["id"] for event in events} == {"old"}


def test_an_error_of_a_continued_stream_has_its_status(resume):
    text = json.dumps({"error": {"code": 400, "message": "too long"}})
    read = resume.ResumedEvents({"messages": []}, RESUME, lambda _: [], "m").read
    assert read(text) == ([text.encode()], {"status": 400})
