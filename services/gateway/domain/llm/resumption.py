"""Decide if a stream can continue after its worker was lost, and prepare the continuation."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import orjson

from tidegate.kernel.protocol.llm import Meta, Resume

# The events of a stream are parsed only if they have more bytes than this in total, or if the worker is lost.
# Parsing is slow, and most streams have fewer bytes.
KEPT_BYTES = 64 * 1024

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_GUIDED = (
    "json_schema", "grammar", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structured_outputs", "guided_decoding_backend", "guided_whitespace_pattern",
)  # fmt: skip
_TOOLS = ("tools", "functions")
_PENALTIES = ("presence_penalty", "frequency_penalty")
_ELSEWHERE = ("reasoning_content", "reasoning", "tool_calls", "function_call")


def obstacle(path: str, body: Mapping[str, Any]) -> str:
    """Return why a stream cannot continue on another worker; empty if it can.

    In a message, the returned text follows the words "it has". Another engine continues from the prompt and
    from the tokens that the caller already has. So it cannot continue a request with several answers. It also
    cannot continue an answer that depends on other state, such as the position in a grammar.
    """
    if path not in (CHAT, TEXT):
        return f"events of {path}"
    if any(_above_one(body.get(name)) for name in ("n", "best_of")) or _several(body.get("prompt")):
        return "several answers"
    form = body.get("response_format")
    plain = form is None or (isinstance(form, dict) and form.get("type") == "text")
    if not plain or any(body.get(name) for name in _GUIDED):
        return "guided decoding"
    if any(body.get(name) for name in _TOOLS):
        return "tools"
    logprobs = body.get("logprobs")
    if logprobs is not None and logprobs is not False:  # 0 also requests log probabilities
        return "log probabilities"
    if body.get("echo"):
        return "an echo of its prompt"
    if any(body.get(name) for name in _PENALTIES):
        return "penalties for the tokens of its answer"
    return ""


def _above_one(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _several(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)


class AfterLoss(NamedTuple):
    """The next step after a worker was lost.

    ``problem``: why the stream fails; a message has this text after "because".
    """

    action: Literal["continue", "end", "fail"]
    problem: str = ""


class StreamProgress:
    """Record the part of an answer that the caller already has, so that another worker can continue it."""

    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        self._streamed = body.get("stream") is True
        self._obstacle = obstacle(path, body)
        self._prompt: array[int] = array("I")
        self._ids: array[int] = array("I")
        self._events: list[bytes] = []
        self._bytes = 0
        self._text: list[str] = []
        self._head: dict[str, Any] = {}
        self._usage: tuple[int, int, int] | None = None
        self._emitted = self._finished = self._counted = False

    @property
    def tokens(self) -> int:
        """Return how many tokens of the answer the caller has; 0 if the engine does not report token ids."""
        return len(self._ids)

    def add(self, events: Sequence[bytes], meta: Meta) -> None:
        """Record events that the caller gets. ``meta``: the worker's token ids and usage for these events."""
        if meta.usage is not None:
            self._usage = meta.usage
        if meta.prompt_ids and not self._prompt:
            self._prompt.extend(meta.prompt_ids)
        if meta.ids:
            self._ids.extend(meta.ids)
        if events:
            self._emitted = True
            self._events += events
            self._bytes += sum(map(len, events))
            if self._bytes > KEPT_BYTES:
                self._read()

    def after_loss(self, *, retry_safe: bool = True) -> AfterLoss:
        """Decide what happens after the worker was lost: continue, fail, or end an answer that is complete.

        ``retry_safe``: True if requests of this Deployment may run twice.
        """
        if self._emitted and not self._streamed:
            return AfterLoss("end")
        self._read()
        if self._finished:
            return AfterLoss("end")
        if not retry_safe:
            return AfterLoss("fail", "its Deployment has `retry: never`")
        if not self._emitted:
            return AfterLoss("continue")
        if self._obstacle:
            return AfterLoss("fail", f"it has {self._obstacle}")
        if not self._prompt or (any(self._text) and not self._ids):
            return AfterLoss("fail", "the engine does not report the ids of its tokens")
        return AfterLoss("continue")

    def resume(self) -> Resume | None:
        """Return what another worker needs to continue the answer; None if the caller has nothing yet.

        With None, the other worker must start the answer from the beginning.
        """
        if not self._emitted:
            return None
        self._read()
        id_, created = self._head.get("id"), self._head.get("created")
        return Resume(
            list(self._prompt),
            list(self._ids),
            "".join(self._text),
            id_ if isinstance(id_, str) else "",
            created if isinstance(created, int) else 0,
        )

    def aligned(self, event: bytes) -> bytes | None:
        """Return an event of the second worker with the id and time of the first worker's events.

        Return None for an event that only repeats the beginning of the answer.
        """
        document = orjson.loads(event)
        if not self._head or not isinstance(document, dict):
            return event
        document |= {name: self._head[name] for name in ("id", "created") if name in self._head}
        for choice in document.get("choices", ()):
            delta = choice.get("delta")
            if not isinstance(delta, dict) or delta.pop("role", None) is None:
                continue
            if not any(delta.values()) and choice.get("finish_reason") is None:
                return None
        return orjson.dumps(document)

    def last_events(self) -> list[bytes]:
        """Return a list with the event for the token usage, if a complete answer lacks this event.

        The event is missing if the worker was lost before it sent this event. The list is empty if the event
        is not missing, if the answer is not a stream, or if the token usage is not known.
        """
        if not self._streamed or self._counted or self._usage is None:
            return []
        prompt, answer, cached = self._usage
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return [orjson.dumps(self._head | {"choices": [], "usage": counts})]

    def _read(self) -> None:
        """Parse the events that are not parsed yet. Then keep their text instead of the events."""
        events, self._events, self._bytes = self._events, [], 0
        for event in events:
            document = orjson.loads(event)
            if not isinstance(document, dict):
                self._obstacle = self._obstacle or "events of an unknown form"
                continue
            if not self._head:
                self._head = {k: document[k] for k in ("id", "object", "created", "model") if k in document}
            choices = document.get("choices") or ()
            self._counted = self._counted or bool(document.get("usage") and not choices)
            for choice in choices:
                self._read_choice(choice)

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in _ELSEWHERE):
            self._obstacle = self._obstacle or "more than text"
        self._text.append(delta.get("content") or choice.get("text") or "")
        self._finished = self._finished or choice.get("finish_reason") is not None
