"""The estimate of a request's tokens."""

from __future__ import annotations

import pytest

from services.gateway.domain.llm.estimate import USUAL_ANSWER, estimate
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.llm import LlmRequest

pytestmark = pytest.mark.unit

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "context", "expected"),
    [
        (TEXT, {"prompt": "a" * 40, "max_tokens": 7}, None, (10, 7)),
        (TEXT, {"prompt": ["a" * 40, "b" * 4], "max_tokens": 7}, None, (11, 14)),
        (TEXT, {"prompt": [1, 2, 3], "max_tokens": 7}, None, (3, 7)),
        (TEXT, {"prompt": [[1, 2, 3], [4]], "max_tokens": 7, "n": 3}, None, (4, 42)),
        (TEXT, {"prompt": "a", "max_tokens": 1, "n_predict": 900}, None, (1, 900)),
        (TEXT, {"prompt": "a", "max_tokens": 1000}, 100, (1, 99)),
        (TEXT, {"prompt": "a" * 4000, "max_tokens": 10}, 100, (1000, 1)),
        (TEXT, {"prompt": "a"}, 100, (1, 99)),
        (TEXT, {"prompt": "a"}, None, (1, USUAL_ANSWER)),
        (TEXT, {"prompt": "a", "max_tokens": "x", "n": True}, None, (1, USUAL_ANSWER)),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 8}], "max_tokens": 2}, None, (6, 2)),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 3, "max_tokens": 9},
         None, (5, 9)),
        ("/v1/responses", {"input": "a" * 8, "instructions": "b" * 4, "max_output_tokens": 5}, None, (3, 5)),
        ("/v1/embeddings", {"input": ["a" * 8, "b"]}, 512, (3, 0)),
        (CHAT, {}, None, (1, USUAL_ANSWER)),
    ],
)  # fmt: skip
def test_tokens(path, body, context, expected):
    found = estimate(path, body, context)
    assert tuple(found) == expected
    assert found.total == sum(expected)


def test_an_image_counts_once_whatever_its_bytes():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}, image]}]}
    assert 1024 < estimate(CHAT, body, None).prompt < 1100


def test_a_body_that_is_nested_deeply():
    nested: list = []
    for _ in range(1000):
        nested = [nested]
    assert estimate(TEXT, {"prompt": nested}, None).prompt == 1
    with pytest.raises(BadRequest, match="cannot be sent to the engine"):
        estimate(CHAT, {"tools": nested}, None)
    with pytest.raises(BadRequest, match="cannot be sent to the engine"):
        LlmRequest(CHAT, {"messages": nested}).to_bytes()
