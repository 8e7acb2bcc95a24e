"""Ollama's API: requests for an engine, and events from one."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from services.gateway.domain.llm import ollama_answers, ollama_models, ollama_requests
from services.gateway.domain.llm.engine_events import Piece, Token
from services.gateway.domain.llm.ollama_answers import Durations, OllamaAnswer
from services.gateway.domain.llm.ollama_models import LlmModel
from tidegate.kernel.errors import BadRequest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
STAMP = "2026-01-02T03:04:05.000000Z"
HELLO = {"model": "smol", "messages": [{"role": "user", "content": "hi"}]}


def test_a_chat_streams_by_default_and_its_options_have_the_engines_names() -> None:
    options = {
        "num_predict": 5, "temperature": 0, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "seed": 1, "stop": ["x"],
        "repeat_penalty": 1.2, "num_ctx": 4096, "speed": 3,
    }  # fmt: skip
    call = ollama_requests.chat(HELLO | {"options": options, "keep_alive": "5m"})
    assert (call.path, call.stream) == ("/v1/chat/completions", True)
    assert call.body == {
        "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5, "temperature": 0,
        "top_k": 2, "top_p": 0.5, "min_p": 0.1, "seed": 1, "stop": ["x"], "repetition_penalty": 1.2,
        "repeat_penalty": 1.2,
    }  # fmt: skip
    assert set(call.ignored) == {"keep_alive", "num_ctx", "speed"}
    assert "max_tokens" not in ollama_requests.chat(HELLO | {"options": {"num_predict": -1}}).body


def test_a_format_is_a_response_format_and_in_completions_llama_cpps_schema_too() -> None:
    schema = {"type": "object", "properties": {}}
    assert ollama_requests.chat(HELLO | {"format": "json"}).body["response_format"] == {"type": "json_object"}
    wanted = ollama_requests.chat(HELLO | {"format": schema}).body["response_format"]
    assert wanted["json_schema"]["schema"] == schema
    raw = {"model": "smol", "prompt": "x", "raw": True, "format": schema}
    assert ollama_requests.generate(raw).body["json_schema"] == schema
    with pytest.raises(BadRequest, match="format"):
        ollama_requests.chat(HELLO | {"format": "xml"})


def test_images_become_data_urls() -> None:
    message = {"role": "user", "content": "what?", "images": ["iVBORw0KGgoAAAA"]}
    call = ollama_requests.chat({"model": "smol", "messages": [message]})
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgoAAAA"}}
    assert call.images
    assert call.body["messages"][0]["content"] == [{"type": "text", "text": "what?"}, url]
    with pytest.raises(BadRequest, match="base64"):
        ollama_requests.chat({"model": "smol", "messages": [message | {"images": ["???"]}]})


def test_answers_of_tools_belong_to_the_oldest_open_call_of_their_tool() -> None:
    calls = [{"function": {"name": name, "arguments": {"of": name}}} for name in ("time", "place", "time")]
    answers = [{"role": "tool", "tool_name": name, "content": name} for name in ("place", "time", "time")]
    history = [{"role": "assistant", "content": "", "tool_calls": calls}, *answers]
    sent = ollama_requests.chat(HELLO | {"messages": history}).body["messages"]
    ids = [call["id"] for call in sent[0]["tool_calls"]]
    assert [message["tool_call_id"] for message in sent[1:]] == [ids[1], ids[0], ids[2]]
    assert sent[0]["tool_calls"][0]["function"] == {"name": "time", "arguments": '{"of":"time"}'}
    with pytest.raises(BadRequest, match="answers no call of 'time'"):
        ollama_requests.chat(HELLO | {"messages": [answers[1]]})


def test_generate_is_a_chat_of_one_message_unless_the_prompt_is_raw() -> None:
    call = ollama_requests.generate(
        {"model": "smol", "prompt": "p", "system": "s", "think": False, "stream": False}
    )
    assert (call.kind, call.path, call.stream) == ("generate", "/v1/chat/completions", False)
    assert [m["content"] for m in call.body["messages"]] == ["s", "p"]
    assert call.body["chat_template_kwargs"] == {"enable_thinking": False}
    raw = ollama_requests.generate({"model": "smol", "prompt": "p", "raw": True, "logprobs": True})
    assert (raw.path, raw.body) == ("/v1/completions", {"prompt": "p", "stream": True, "logprobs": 1})
    filled = ollama_requests.generate({"model": "smol", "prompt": "p", "suffix": "s"})
    assert (filled.path, filled.body["suffix"]) == ("/v1/completions", "s")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1, 2]}, "context"),
        ({"raw": True, "images": ["iVBORw0KGgo"]}, "images"),
        ({"options": {"num_predict": "many"}}, "num_predict"),
        ({"stream": "no"}, "stream"),
        ({"model": ""}, "/api/tags"),
    ],
)
def test_a_wrong_request_is_refused_by_name(more: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        ollama_requests.generate({"model": "smol", "prompt": "p"} | more)


def test_a_request_without_a_prompt_only_loads_or_unloads() -> None:
    call = ollama_requests.generate({"model": "smol"})
    assert call.path == ""
    assert ollama_answers.loaded(call, NOW) == {
        "model": "smol",
        "created_at": STAMP,
        "response": "",
        "done": True,
        "done_reason": "load",
    }
    unload = ollama_requests.chat({"model": "smol", "messages": [], "keep_alive": 0})
    assert ollama_answers.loaded(unload, NOW)["done_reason"] == "unload"


def test_a_chats_stream_has_a_line_for_each_event_and_the_counts_at_its_end() -> None:
    answer = OllamaAnswer(ollama_requests.chat(HELLO))
    lines = answer.add(Piece("hel", tokens=[Token("hel", -1.0, 3)]), NOW) + answer.add(Piece("lo"), NOW)
    answer.add(Piece(finish="length", usage=(7, 2)), NOW)
    lines += answer.end(NOW, Durations(load=10, first=30, total=100))
    read = [orjson.loads(line) for line in lines]
    assert [line["message"]["content"] for line in read] == ["hel", "lo", ""]
    assert [line["done"] for line in read] == [False, False, True]
    assert read[0]["logprobs"] == [{"token": "hel", "logprob": -1.0}]
    counts = {name: read[-1][name] for name in read[-1] if name.endswith(("duration", "count", "reason"))}
    assert counts == {
        "done_reason": "length", "total_duration": 100, "load_duration": 10, "prompt_eval_count": 7,
        "prompt_eval_duration": 20, "eval_count": 2, "eval_duration": 70,
    }  # fmt: skip


def test_the_engines_own_times_are_preferred() -> None:
    answer = OllamaAnswer(ollama_requests.chat(HELLO))
    answer.add(Piece("x", timings={"prompt_ms": 1.5, "predicted_ms": 2.0}), NOW)
    whole = answer.whole(NOW, Durations(0, 1, 2))
    assert (whole["prompt_eval_duration"], whole["eval_duration"]) == (1_500_000, 2_000_000)


def test_parts_of_tool_calls_become_whole_calls() -> None:
    answer = OllamaAnswer(ollama_requests.chat(HELLO))
    for delta in (
        {"index": 0, "id": "a", "function": {"name": "time", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"of":'}},
        {"index": 1, "function": {"name": "bad", "arguments": "not json"}},
        {"index": 0, "function": {"arguments": '"Rome"}'}},
    ):
        assert answer.add(Piece(tool_calls=[delta]), NOW) == []
    calls, last = map(orjson.loads, answer.end(NOW, Durations(0, 1, 2)))
    assert [call["function"] for call in calls["message"]["tool_calls"]] == [
        {"name": "time", "arguments": {"of": "Rome"}},
        {"name": "bad", "arguments": {"arguments": "not json"}},
    ]
    assert not calls["done"]
    assert last["done"]


def test_reasoning_is_thinking_and_generate_has_a_response() -> None:
    answer = OllamaAnswer(ollama_requests.generate({"model": "smol", "prompt": "p"}))
    (line,) = answer.add(Piece(reasoning="hm"), NOW)
    assert orjson.loads(line) == {
        "model": "smol", "created_at": STAMP, "response": "", "thinking": "hm", "done": False}  # fmt: skip
    answer.add(Piece("yes"), NOW)
    whole = answer.whole(NOW, Durations(0, 1, 2))
    assert (whole["response"], whole["thinking"], whole["done"]) == ("yes", "hm", True)


def test_embeddings_come_in_the_order_of_their_inputs() -> None:
    body, ignored = ollama_requests.embed(
        {"model": "smol", "input": ["a", "b"], "truncate": True, "dimensions": 2}
    )
    assert body == {"input": ["a", "b"], "dimensions": 2}
    assert set(ignored) == {"truncate"}
    data = [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": [1.0, 2.0]}]
    answer = orjson.dumps({"data": data, "usage": {"prompt_tokens": 6}})
    shown = ollama_answers.embeddings("smol", answer, Durations(1, 2, 9))
    assert (shown["embeddings"], shown["prompt_eval_count"]) == ([[1.0, 2.0], [3.0, 4.0]], 6)
    assert ollama_requests.embed_one({"model": "smol", "prompt": "a"})[0] == {"input": ["a"]}
    assert ollama_answers.embedding(answer) == {"embedding": [1.0, 2.0]}
    with pytest.raises(BadRequest, match="input"):
        ollama_requests.embed({"model": "smol"})


def test_models_have_the_tag_latest_which_names_may_leave_out() -> None:
    models = [LlmModel("a", 2048, ready=True), LlmModel("b"), LlmModel("b:fr")]
    names = [model["name"] for model in ollama_models.tags(models)["models"]]
    assert names == ["a:latest", "b:latest", "b:fr"]
    (running,) = ollama_models.running(models)["models"]
    assert (running["name"], running["context_length"]) == ("a:latest", 2048)
    assert ollama_models.show(models[0])["parameters"] == "num_ctx 2048"
    assert [ollama_requests.endpoint(name) for name in ("a:latest", "a", "a:fr")] == ["a", "a", "a:fr"]
