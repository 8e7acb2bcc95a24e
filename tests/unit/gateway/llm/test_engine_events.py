"""The events of engines as pieces: llama.cpp's and vLLM's forms, and errors."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.domain.llm.engine_events import UNKNOWN_ID, Piece, Token, read, read_all
from tidegate.kernel.errors import ModelFailed


def event(**choice: object) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, **choice}]})


def test_a_chats_event_has_text_reasoning_and_parts_of_tool_calls() -> None:
    delta = {"content": "hi", "reasoning_content": "hm", "tool_calls": [{"index": 0}]}
    piece = read(event(delta=delta, finish_reason=None))
    assert (piece.text, piece.reasoning, piece.tool_calls) == ("hi", "hm", [{"index": 0}])
    assert read(event(delta={"role": "assistant", "content": None})) == Piece()


def test_llama_cpp_reports_tokens_of_a_completion_as_for_chats() -> None:
    entry = {"id": 7042, "token": " Paris", "logprob": -0.25, "top_logprobs": [
        {"id": 260, "token": " the", "logprob": -2.5}]}  # fmt: skip
    piece = read(event(text=" Paris", logprobs={"content": [entry]}))
    assert piece.tokens == [Token(" Paris", -0.25, 7042, [Token(" the", -2.5, 260)])]


def test_vllm_reports_tokens_of_a_completion_in_lists() -> None:
    logprobs = {
        "tokens": ["a", "b"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {"b": -1.5, "c": -2.0}],
        "text_offset": [0, 1],
    }  # fmt: skip
    tokens = read(event(text="ab", logprobs=logprobs)).tokens
    assert tokens == [Token("a", 0.0), Token("b", -1.5, likely=[Token("b", -1.5), Token("c", -2.0)])]


def test_ids_that_the_worker_reports_belong_to_the_tokens_of_all_events() -> None:
    events = [
        event(text=text, logprobs={"tokens": list(text), "token_logprobs": [-1.0] * len(text)})
        for text in ("a", "bc", "")
    ]

    def ids(*reported: int) -> list[list[int]]:
        return [[token.id for token in piece.tokens] for piece in read_all(events, reported)]

    assert ids(4, 5, 6) == [[4], [5, 6], []]
    assert ids(4, 5) == [[UNKNOWN_ID], [UNKNOWN_ID, UNKNOWN_ID], []]


def test_the_last_event_has_counts_and_the_reason_of_the_end() -> None:
    document = {
        "choices": [],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3},
        "timings": {"prompt_ms": 2},
    }
    piece = read(orjson.dumps(document))
    assert (piece.usage, piece.timings, piece.finish) == ((5, 3), {"prompt_ms": 2}, None)
    ended = read(event(text="", finish_reason="stop", stop_reason="END"))
    assert (ended.finish, ended.stopped_by) == ("stop", "END")
    assert read(event(text="", finish_reason="stop", stop_reason=2)).stopped_by is None


@pytest.mark.parametrize("error", ["it broke", {"message": "it broke", "type": "server_error"}])
def test_an_error_event_raises_with_the_engines_words(error: object) -> None:
    with pytest.raises(ModelFailed, match="it broke"):
        read(orjson.dumps({"error": error}))
