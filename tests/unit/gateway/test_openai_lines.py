"""Lines of OpenAI's batch files: what is a request, which lines are bad, the lines of results."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from services.gateway.domain.llm_jobs import LlmJobAnswer
from services.gateway.domain.openai.lines import (
    MAX_ERRORS,
    MOST_MODELS,
    FileCheck,
    LineError,
    custom_id,
    failed_line,
    read_line,
    result_line,
)
from tidegate.kernel.errors import Conflict, DeadlinePassed, ModelFailed, NotFound

URL = "/v1/chat/completions"
BODY = {"model": "chat", "messages": []}


def line(**given: Any) -> bytes:
    return orjson.dumps({"custom_id": "a", "method": "POST", "url": URL, "body": BODY} | given)


def test_a_request():
    assert read_line(line(), URL) == ("a", "chat", BODY)


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (line(custom_id=5), "missing_required_parameter", "custom_id"),
        (line(custom_id="x" * 513), "missing_required_parameter", "custom_id"),
        (line(method="post"), "invalid_method", "method"),
        (line(url="/v1/embeddings"), "invalid_url", "url"),
        (line(body="x"), "missing_required_parameter", "body"),
        (line(body=BODY | {"model": "x" * 513}), "missing_required_parameter", "body.model"),
        (line(body={}), "missing_required_parameter", "body.model"),
        (line(body=BODY | {"stream": True}), "invalid_request", "body.stream"),
    ],
)
def test_bad_lines(raw, code, param):
    with pytest.raises(LineError) as told:
        read_line(raw, URL)
    assert (told.value.code, told.value.param) == (code, param)


def checked(lines: list[bytes], unknown: str = "") -> FileCheck:
    def check_model(name: str) -> None:
        if name == unknown:
            raise NotFound(f"there is no model {name!r}")

    found = FileCheck(URL, check_model)
    for each in lines:  # in pieces, as the chunks of a file come
        found.add([each])
    return found


def test_a_good_file():
    found = checked([line(custom_id=f"{n}") for n in range(5)])
    assert (found.errors, found.requests, found.model) == ([], 5, "chat")


def test_a_file_of_several_models_names_none():
    found = checked([line(), line(custom_id="b", body={"model": "other"})])
    assert (found.errors, found.model) == ([], "")


def test_a_file_that_names_many_models_does_not_fill_the_memory():
    models = [f"m{n}" for n in range(MOST_MODELS + 1)]
    found = checked([line(custom_id=each, body={"model": each}) for each in models])
    assert (found.errors, found.model, len(found._models)) == ([], "", 1)


def test_numbers_of_bad_lines_count_blank_lines():
    found = checked([line(), b"", b" \r", line(), line(custom_id="b", body={"model": "gone"})], "gone")
    assert [(error.line, error.code) for error in found.errors] == [
        (4, "duplicate_custom_id"),
        (5, "model_not_found"),
    ]
    assert found.errors[0].public() == {
        "code": "duplicate_custom_id",
        "message": "an earlier line has the custom_id 'a' too",
        "param": "custom_id",
        "line": 4,
    }


def test_the_errors_of_a_bad_file_are_bounded():
    assert len(checked([b"x"] * (MAX_ERRORS + 50)).errors) == MAX_ERRORS


@pytest.mark.parametrize(
    ("raw", "found"), [(line(), "a"), (b"x", None), (b"[]", None), (b'{"custom_id":1}', None)]
)
def test_the_id_of_any_line(raw, found):
    assert custom_id(raw) == found


def test_a_result_is_one_line_with_the_engines_own_json():
    raw = result_line("a", "0123", LlmJobAnswer(200, b'{"x":1.50}'))
    assert raw == (
        b'{"id":"batch_req_0123","custom_id":"a","response":{"status_code":200,"request_id":"0123",'
        b'"body":{"x":1.50}},"error":null}'
    )
    pretty = result_line("a", "0123", LlmJobAnswer(400, b'{\n  "error": {"code": 1}\r\n}'))
    assert b"\n" not in pretty
    assert b"\r" not in pretty
    assert orjson.loads(pretty)["response"]["body"] == {"error": {"code": 1}}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlinePassed("late", reason="expired"), "batch_expired"),
        (Conflict("stopped", reason="cancelled"), "batch_cancelled"),
        (ModelFailed("broken"), "model_failed"),
    ],
)
def test_a_line_without_an_answer(error, code):
    document = orjson.loads(failed_line("7", "a", error))
    assert document == {
        "id": "batch_req_7",
        "custom_id": "a",
        "response": None,
        "error": {"code": code, "message": error.message},
    }
