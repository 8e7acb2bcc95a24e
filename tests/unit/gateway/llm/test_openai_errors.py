"""Errors in OpenAI's words."""

from __future__ import annotations

import orjson
import pytest

from services.gateway.api.llm import openai_errors
from services.gateway.api.llm.openai_errors import openai_error, openai_response
from services.gateway.domain.llm.refusal import EngineRefused
from tidegate.kernel import errors

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (errors.BadRequest("x"), 400, "invalid_request_error", "bad_request"),
        (errors.Unauthorized("x"), 401, "authentication_error", "invalid_api_key"),
        (errors.Forbidden("x"), 403, "permission_error", "insufficient_permissions"),
        (errors.NotFound("x"), 404, "invalid_request_error", "model_not_found"),
        (errors.PayloadTooLarge("x"), 413, "invalid_request_error", "request_too_large"),
        (errors.TooMany("x", reason="rate_limited"), 429, "rate_limit_error", "rate_limit_exceeded"),
        (errors.TooMany("x", reason="quota_exhausted"), 429, "insufficient_quota", "insufficient_quota"),
        (errors.Overloaded("x"), 503, "server_error", "overloaded"),
        (errors.ColdStart("x"), 503, "server_error", "cold_start"),
        (errors.DeadlinePassed("x"), 504, "server_error", "timeout"),
        (errors.ModelFailed("x"), 500, "server_error", "model_failed"),
        (errors.WorkerLost("x"), 503, "server_error", "worker_lost"),
        (EngineRefused(400, b'{"error":{"message":"bad","code":400}}'), 400, "invalid_request_error", None),
        (EngineRefused(501, b'{"error":"no embeddings"}'), 501, "server_error", None),
        (EngineRefused(429, b"{}", 3.0), 429, "rate_limit_error", "rate_limit_exceeded"),
        (
            EngineRefused(401, b'{"error":{"message":"Incorrect API key"}}'),
            502,
            "server_error",
            "upstream_refused",
        ),
        (
            EngineRefused(400, b'{"error":{"type":"exceed_context_size_error","message":"too long"}}'),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (
            EngineRefused(400, b'{"message":"This model\'s maximum context length is 16 tokens."}'),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
    ],
)
def test_words(error, status, kind, code):
    found = openai_error(error)
    assert (found.status, found.type, found.code) == (status, kind, code)
    assert set(orjson.loads(found.body())["error"]) == {"message", "type", "param", "code"}


def test_headers():
    error = errors.TooMany("x", retry_after_s=1.2, headers={"RateLimit": "a"})
    headers = openai_response(error).headers
    assert (headers["retry-after"], headers["ratelimit"]) == ("2", "a")
    assert openai_response(EngineRefused(429, b"", 7.0)).headers["retry-after"] == "7"
    assert openai_response(errors.Unauthorized("x")).headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "openai"),
    [
        ("/v1/chat/completions", True),
        ("/v1/models", True),
        ("/v1/models/a", True),
        ("/v1/jobs", False),
        ("/v2/models", False),
    ],
)
def test_only_the_paths_of_openai(path, openai):
    answer = openai_errors.answer_at(path, errors.Unauthorized("x"), "rid")
    assert answer.status_code == 401
    assert isinstance(orjson.loads(answer.body)["error"], dict) is openai


def test_the_last_event_of_a_stream_that_failed():
    found = openai_error(errors.WorkerLost("gone"))
    assert found.event(named=False) == b"data: " + found.body() + b"\n\n"
    named = found.event(named=True)
    assert named.startswith(b'event: error\ndata: {"message":"gone"')
    assert b'"type":"error"' in named
