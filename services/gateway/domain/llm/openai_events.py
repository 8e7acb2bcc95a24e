"""Turn an engine's events into events of OpenAI's API. Most events are passed on without parsing."""

from __future__ import annotations

import re
from typing import Any

import orjson

# These patterns do not match inside the answer's text, because quotes in a JSON string are escaped.
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_USAGE = b'"usage"'

DONE = b"data: [DONE]\n\n"


class EventFilter:
    """A filter for the events of one answer.

    It replaces the model's name by the endpoint's name. It also removes the token counts (``usage``) if the
    caller did not request them.
    """

    def __init__(self, model: str, *, usage: bool) -> None:
        self._model = orjson.dumps(model)
        self._named = b'"model":' + self._model
        self._usage = usage

    def chunk(self, event: bytes) -> bytes:
        """Return an event for the caller; empty if it has only token counts that were not requested."""
        if not self._usage and _USAGE in event and not (event := _without_usage(event)):
            return b""
        return self.named(event)

    def named(self, event: bytes) -> bytes:
        """Return an event or a whole answer with the endpoint's name as its model."""
        if self._named in event:
            return event
        found = _MODEL.search(event)
        if found is None or found[1] == self._model:
            return event
        return _MODEL.sub(lambda _: self._named, event)


def _without_usage(event: bytes) -> bytes:
    document: dict[str, Any] = orjson.loads(event)
    if not isinstance(document, dict) or "usage" not in document:
        return event
    usage = document.pop("usage")
    if usage is not None and document.get("choices") == []:
        return b""
    return orjson.dumps(document)


def wants_usage(body: dict[str, Any]) -> bool:
    """Return True if the request wants the usage in the last event of the stream."""
    options = body.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def sse(event: bytes) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % event


def named_sse(event: bytes) -> bytes:
    """Return a server-sent event named by its type, as in the Responses API."""
    document = orjson.loads(event)
    name = document.get("type") if isinstance(document, dict) else None
    if not isinstance(name, str) or not name.isprintable():
        return sse(event)
    return b"event: %b\ndata: %b\n\n" % (name.encode(), event)
