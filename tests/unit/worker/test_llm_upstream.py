"""Limits, paths and redirects of an upstream, against hostile callers."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.unit

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm(llm_module) -> Any:
    return SimpleNamespace(**{name: llm_module(name) for name in ("bridge", "calls", "upstream")})


@pytest.fixture
def engine(llm: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return an engine whose upstream answers with a status."""

    def made(status: int, body: bytes = b"{}") -> Any:
        def relay(*_: object, **__: object) -> None:
            raise llm.bridge.Failure(status, body)

        monkeypatch.setattr(llm.upstream, "relay", relay)
        plan = {
            "upstream": "http://u/v1", "name": "m", "slots": 1, "tokens_per_minute": 1000,
            "requests_per_minute": None,
        }  # fmt: skip
        return llm.upstream.Upstream(plan, "secret")

    return made


@pytest.mark.parametrize("tokens", [10**15, -(10**15), "many", True, 1.5, None])
def test_no_request_closes_or_opens_the_limit_of_tokens(llm, engine, tokens):
    upstream, call = engine(400), llm.calls.Call()
    for _ in range(3):
        upstream.call(CHAT, {"max_tokens": tokens}, None, call)
    assert call.take(0)[1]["status"] == 400
    left = upstream._tokens._left
    assert 990 <= left <= 1000


@pytest.mark.parametrize("path", ["/v1/files", "/v1/../admin", "/v1/chat/completions?a=b", "/tidegate/stats"])
def test_only_paths_of_requests_reach_an_upstream(llm, engine, path):
    with pytest.raises(llm.calls.Refused, match="serves no requests at the path"):
        engine(200).call(path, {}, None, llm.calls.Call())


def test_a_redirect_is_not_followed_and_is_no_answer(llm, engine):
    call = llm.calls.Call()
    engine(302, b'{"moved": 1}').call(CHAT, {}, None, call)
    (event,), meta, _ = call.take(0)
    assert (meta["status"], json.loads(event)["error"]["code"]) == (502, "upstream_redirects")


def test_a_retry_after_is_a_number_that_json_has(llm):
    for text, expected in (("3", 3.0), ("-1", 0.0), ("inf", None), ("nan", None), ("soon", None)):
        assert llm.bridge.retry_after_s({"Retry-After": text}) == expected


def test_an_answer_that_is_not_json_is_a_failure(llm):
    """It would break the file of a batch's results, in which each line has an answer."""
    events = llm.upstream._UpstreamEvents(b"secret", "u")
    with pytest.raises(llm.calls.Refused, match="other than JSON"):
        events.whole(b"<html>secret</html>")
    assert events.whole(b'{"a": "secret"}') == (b'{"a": "[hidden]"}', {})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"usage": {"prompt_tokens": 5, "completion_tokens": 2}}, [5, 2, 0]),
        (
            {"usage": {"prompt_tokens": None, "completion_tokens": "2", "prompt_tokens_details": []}},
            [0, 0, 0],
        ),
        (
            {"usage": {"prompt_tokens": 5.5, "completion_tokens": -2, "prompt_tokens_details": None}},
            [0, 0, 0],
        ),
        (
            {"response": {"usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 3}}}},
            [5, 0, 3],
        ),
        ({"usage": [1], "response": "x"}, None),
        ({"response": "x"}, None),
    ],
)
def test_whatever_a_provider_reports_its_counts_are_numbers(
    llm: Any, document: dict[str, Any], expected: Any
):
    """A count of another kind would break the slot's accounting, and every limit of tokens."""
    assert llm.bridge.usage_of(document) == expected
