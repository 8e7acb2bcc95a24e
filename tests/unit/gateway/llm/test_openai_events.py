"""The engine's events on their way to a caller of OpenAI's API."""

from __future__ import annotations

import json

import orjson
import pytest

from services.gateway.domain.llm.openai_events import EventFilter, named_sse, sse, wants_usage

pytestmark = pytest.mark.unit


def chunk(**fields) -> bytes:
    return orjson.dumps({"id": "c", "model": "smol", "choices": [{"delta": {"content": "x"}}], **fields})


def test_an_event_that_needs_no_change_is_the_same_object():
    event = chunk()
    assert EventFilter("smol", usage=False).chunk(event) is event


def test_usage_that_was_not_wanted_is_removed():
    events = EventFilter("smol", usage=False)
    assert events.chunk(chunk(choices=[], usage={"total_tokens": 7})) == b""
    for usage in ({"total_tokens": 7}, None):
        left = orjson.loads(events.chunk(chunk(usage=usage)))
        assert left["choices"][0]["delta"] == {"content": "x"}
        assert "usage" not in left


def test_usage_that_was_wanted_stays():
    event = chunk(choices=[], usage={"total_tokens": 7})
    assert EventFilter("smol", usage=True).chunk(event) is event


@pytest.mark.parametrize("dump", [json.dumps, lambda v: json.dumps(v, separators=(",", ":"))])
def test_the_model_is_the_endpoint(dump):
    text = 'a "model": "x" and \\"model\\":\\"smol\\", "usage": 1'
    document = {
        "model": "/path/to.gguf",
        "choices": [{"delta": {"content": text}}],
        "response": {"model": "b"},
    }
    found = orjson.loads(EventFilter('mine:"a', usage=False).chunk(dump(document).encode()))
    assert (found["model"], found["response"]["model"]) == ('mine:"a', 'mine:"a')
    assert found["choices"][0]["delta"]["content"] == text


def test_server_sent_events():
    assert sse(b"{}") == b"data: {}\n\n"
    event = b'{"response":{"type":"x"},"type":"response.created"}'
    assert named_sse(event) == b"event: response.created\ndata: " + event + b"\n\n"
    assert named_sse(b'{"type":"a\\nb"}') == b'data: {"type":"a\\nb"}\n\n'


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ({}, False),
        ({"stream_options": None}, False),
        ({"stream_options": {"include_usage": False}}, False),
        ({"stream_options": {"include_usage": True}}, True),
    ],
)
def test_who_wants_usage(body, wanted):
    assert wants_usage(body) is wanted
