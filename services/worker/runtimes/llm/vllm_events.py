"""Make vLLM report token counts and ids, and remove them from the events for the caller. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from bridge import error_status, usage_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def prepared(path: str, body: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the request body for the engine.

    ``model``: the model's name in the engine. It replaces the model's name in the body. For chats and
    completions, the body also has options that make vLLM report token counts and ids.
    """
    body = {**body, "model": model}
    if path in (CHAT, COMPLETIONS):
        body["return_token_ids"] = True
        if body.get("stream"):
            options = body.get("stream_options") or {}
            body["stream_options"] = {**options, "include_usage": True, "continuous_usage_stats": True}
    return body


class VllmEvents:
    """Convert the events of one answer for the caller.

    Fields that only :func:`prepared` requested are removed.

    ``on_failure``: :meth:`read` calls this function before it returns an event about a failure of the engine.
    """

    def __init__(self, body: dict[str, Any], on_failure: Callable[[], None] = lambda: None) -> None:
        self._on_failure = on_failure
        self._keep_ids = bool(body.get("return_token_ids"))
        self._keep_usage = bool((body.get("stream_options") or {}).get("continuous_usage_stats"))
        self._model = body.get("model")
        # Token ids are needed only to continue a lost stream. A stream can be continued only if it has one
        # choice. If the prompt is a list, the answer may have several choices.
        self._ids = (body.get("n") or 1) == 1 and not isinstance(body.get("prompt"), list)
        self._answer: dict[int, int] = {}

    def read(self, event: bytes) -> tuple[list[bytes], dict[str, Any]]:
        """Convert an event of the engine to events for the caller. Also return the event's facts.

        The facts are token counts and token ids, or the status of an error.
        """
        document = json.loads(event)
        if (status := error_status(document)) is not None:
            if status >= 500:
                self._on_failure()
            return [event], {"status": status}
        meta = self._facts(document)
        if document.get("choices") and not self._keep_usage:
            document.pop("usage", None)
        return [_packed(document)], meta

    def whole(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """Convert the body of a non-streamed answer for the caller. Also return the answer's facts.

        The facts are token counts and token ids.
        """
        try:
            document = json.loads(body)
        except ValueError:
            return body, {}
        if not isinstance(document, dict):
            return body, {}
        meta = self._facts(document)
        return _packed(document), meta

    def _facts(self, document: dict[str, Any]) -> dict[str, Any]:
        choices = document.get("choices") or []
        meta: dict[str, Any] = {}
        prompt = self._taken(document, "prompt_token_ids")
        ids: list[int] = []
        for choice in choices:
            prompt = self._taken(choice, "prompt_token_ids") or prompt
            ids += self._taken(choice, "token_ids") or []
        if self._ids and prompt:
            meta["prompt_ids"] = prompt
        if self._ids and ids:
            meta["ids"] = ids
        if usage := usage_of(document):
            meta["usage"] = self._summed(choices, usage, document)
        if self._model is not None and "model" in document:
            document["model"] = self._model
        return meta

    def _summed(self, choices: list[Any], usage: list[int], document: dict[str, Any]) -> list[int]:
        """Return the token counts of the answer. The answer tokens of all choices are added up.

        In a stream, each event has only the answer tokens of its own choice.
        """
        if not str(document.get("object", "")).endswith((".chunk", "text_completion")) or len(choices) != 1:
            return usage
        index = choices[0].get("index", 0)
        self._answer[index] = usage[1]
        return [usage[0], sum(self._answer.values()), usage[2]]

    def _taken(self, part: dict[str, Any], name: str) -> list[int] | None:
        found = part.get(name)
        if not self._keep_ids:
            part.pop(name, None)
            part.pop("prompt_text", None)
        return found


def _packed(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
