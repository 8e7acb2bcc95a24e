"""TGI's API: requests for an engine, and events from one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.gateway.domain.llm import tgi_requests
from services.gateway.domain.llm.engine_events import Piece, Token
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.llm.tgi_answers import TgiAnswer, error_type
from tidegate.kernel.errors import BadRequest, ModelFailed, NotFound, TooMany


def request(stream: bool = False, **parameters: Any) -> tgi_requests.Generation:
    return tgi_requests.decode({"inputs": "one two", "parameters": parameters}, stream=stream)


def test_a_request_without_sampling_is_greedy_and_has_tgis_default_length() -> None:
    assert request().body == {"prompt": "one two", "max_tokens": 100, "stream": True, "temperature": 0.0}
    assert request(temperature=1.0).body["temperature"] == 0.0
    assert request(do_sample=True).body["temperature"] == 1.0
    assert request(top_k=5).body | {"max_tokens": 0} == request(top_k=5, temperature=1.0).body | {
        "max_tokens": 0
    }


def test_parameters_have_the_engines_names() -> None:
    body = request(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=4, seed=3, stop=["\n"],
        repetition_penalty=1.1, frequency_penalty=0.2, typical_p=0.7,
    ).body  # fmt: skip
    assert body == {
        "prompt": "one two", "max_tokens": 7, "stream": True, "temperature": 0.5, "top_p": 0.9, "top_k": 4,
        "typical_p": 0.7, "seed": 3, "stop": ["\n"], "repetition_penalty": 1.1, "repeat_penalty": 1.1,
        "frequency_penalty": 0.2,
    }  # fmt: skip


def test_a_grammar_is_a_schema_for_both_engines() -> None:
    schema = {"type": "object"}
    body = request(grammar={"type": "json", "value": schema}).body
    assert body["json_schema"] == body["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "best_of"),
        ({"decoder_input_details": True}, "decoder_input_details"),
        ({"watermark": True}, "watermark"),
        ({"truncate": 5}, "truncate"),
        ({"grammar": {"type": "regex", "value": "a"}}, "regex"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": "7"}, "must be an integer"),
        ({"temperature": 0}, "above 0"),
        ({"stop": [1]}, "list of strings"),
    ],
)
def test_a_wrong_or_impossible_parameter_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        request(**parameters)


@pytest.mark.parametrize("body", [{}, {"inputs": ""}, {"inputs": ["a"]}, {"inputs": "a", "parameters": []}])
def test_a_wrong_body_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        tgi_requests.decode(body, stream=False)


def streamed(request: tgi_requests.Generation, *pieces: Piece) -> list[dict[str, Any]]:
    answer = TgiAnswer(request)
    events = [event for piece in pieces for event in answer.add(piece)]
    return [orjson.loads(event) for event in [*events, answer.last_event()]]


def token(text: str, id_: int) -> Piece:
    return Piece(text, tokens=[Token(text, -0.5, id_)])


def test_a_stream_that_the_model_ends_has_an_event_for_each_token_and_an_empty_special_one() -> None:
    asked = request(stream=True, seed=9)
    events = streamed(asked, token("a", 4), token("b", 5), Piece(finish="stop"), Piece(usage=(3, 3)))
    assert [(e["index"], e["token"]["id"], e["token"]["text"], e["token"]["special"]) for e in events] == [
        (1, 4, "a", False), (2, 5, "b", False), (3, -1, "", True)]  # fmt: skip
    assert [e["generated_text"] for e in events] == [None, None, "ab"]
    assert events[-1]["details"] == {
        "finish_reason": "eos_token", "generated_tokens": 3, "seed": 9, "input_length": 3}  # fmt: skip


def test_a_stream_that_reaches_its_length_ends_with_its_last_token() -> None:
    events = streamed(
        request(stream=True, max_new_tokens=2), token("a", 4), token("b", 5), Piece(finish="length")
    )
    assert [(e["token"]["text"], e["generated_text"]) for e in events] == [("a", None), ("b", "ab")]
    assert events[-1]["details"]["finish_reason"] == "length"


def test_the_texts_of_all_events_are_the_answer_also_if_tokens_are_parts_of_a_character() -> None:
    parts = Piece("é", tokens=[Token("\ufffd", -1.0, 1), Token("\ufffd", -2.0, 2)])
    events = streamed(
        request(stream=True), parts, Piece("xy", tokens=[Token("x", -1.0), Token("y", -1.0)]), Piece("z")
    )
    assert [e["token"]["text"] for e in events] == ["é", "x", "y", "z", ""]
    assert (events[0]["token"]["logprob"], events[0]["token"]["id"]) == (-3.0, 2)


def test_an_answer_has_details_only_if_they_were_requested() -> None:
    plain = TgiAnswer(request(return_full_text=True))
    plain.add(Piece("!"))
    assert plain.whole() == {"generated_text": "one two!"}
    detailed = TgiAnswer(request(details=True, top_n_tokens=1))
    detailed.add(Piece("a", tokens=[Token("a", -0.5, 4, [Token("a", -0.5, 4), Token("b", -2.0, 5)])]))
    detailed.add(Piece(finish="stop", stopped_by="x"))
    details = detailed.whole()["details"]
    shown = {"id": 4, "text": "a", "logprob": -0.5, "special": False}
    assert (details["finish_reason"], details["tokens"], details["top_tokens"]) == (
        "stop_sequence",
        [shown],
        [[shown]],
    )


def test_errors_have_tgis_words() -> None:
    errors = [BadRequest("x"), TooMany("x"), ModelFailed("x"), NotFound("x")]
    assert [error_type(error) for error in errors] == ["validation", "overloaded", "generation", "not_found"]
    refusals = [EngineRefused(status, b"{}") for status in (400, 429, 503)]
    assert [error_type(error) for error in refusals] == ["validation", "overloaded", "generation"]
