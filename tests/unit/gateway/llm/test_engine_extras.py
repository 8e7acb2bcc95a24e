"""Tokens of a text: one request and answer for the forms of vLLM, llama.cpp and TGI."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.gateway.domain.llm import engine_extras
from tidegate.kernel.errors import BadRequest

LLAMA_CPP = orjson.dumps({"tokens": [{"id": 4, "piece": "Hi"}, {"id": 5, "piece": [195, 169]}]})
VLLM = orjson.dumps({"count": 2, "max_model_len": 99, "tokens": [4, 5], "token_strs": ["Hi", "é"]})


@pytest.mark.parametrize("name", ["prompt", "content", "inputs"])
def test_every_apis_request_becomes_one_that_every_engine_reads(name: str) -> None:
    body = engine_extras.tokenize({"model": "m", name: "Hi"})
    assert (body["prompt"], body["content"]) == ("Hi", "Hi")
    assert body["add_special_tokens"] is body["add_special"] is (name != "content")


def test_messages_pass_and_an_engine_without_templates_gets_their_text() -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    assert engine_extras.tokenize(request) == {"messages": request["messages"]}
    assert engine_extras.lacks_template(orjson.dumps({"tokens": []}))
    assert not engine_extras.lacks_template(VLLM)
    assert engine_extras.templated(orjson.dumps({"prompt": "<u>Hi"}), request)["content"] == "<u>Hi"


@pytest.mark.parametrize("body", [{}, {"prompt": 3}, {"messages": "Hi"}])
def test_a_wrong_request_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        engine_extras.tokenize(body)


@pytest.mark.parametrize(("answer", "context"), [(LLAMA_CPP, 64), (VLLM, 99)])
def test_the_answer_is_the_same_from_every_engine(answer: bytes, context: int) -> None:
    request = {"prompt": "Hié", "return_token_strs": True}
    assert engine_extras.tokens(answer, request, 64) == {
        "count": 2, "max_model_len": context, "tokens": [4, 5], "token_strs": ["Hi", "é"]}  # fmt: skip
    spans = [
        {"id": 4, "text": "Hi", "start": 0, "stop": 2}, {"id": 5, "text": "é", "start": 2, "stop": 3},
    ]  # fmt: skip
    assert engine_extras.tokens(answer, {"inputs": "Hié"}, 64) == spans


def test_pieces_are_shown_as_llama_cpp_shows_them() -> None:
    shown = engine_extras.tokens(LLAMA_CPP, {"content": "Hié", "with_pieces": True}, None)
    assert shown["tokens"][0] == {"id": 4, "piece": "Hi"}


def test_tokens_become_text() -> None:
    assert engine_extras.detokenize({"model": "m", "tokens": [1, 2]}) == {"tokens": [1, 2]}
    for answer in ({"prompt": "Hi"}, {"content": "Hi"}):
        assert engine_extras.text_of(orjson.dumps(answer)) == {"prompt": "Hi", "content": "Hi"}
    with pytest.raises(BadRequest, match="tokens"):
        engine_extras.detokenize({"tokens": "Hi"})


def test_a_missing_path_is_named() -> None:
    assert "/pooling" in engine_extras.not_there("m", "/pooling", "File Not Found").message
