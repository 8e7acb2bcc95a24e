"""Read the events of an engine, for APIs other than OpenAI's.

Engines differ in details of OpenAI's API. For log probabilities of ``/v1/completions``, llama.cpp uses the
form of chats, with token ids; vLLM uses OpenAI's older form. A :class:`Piece` is the same for all engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import orjson

from tidegate.kernel.errors import ModelFailed

# The id of a token if the engine does not report it. TGI and Ollama require an integer here. No real token
# has this id.
UNKNOWN_ID = -1


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer. ``likely``: the most likely tokens at its place, if requested."""

    text: str
    logprob: float
    id: int = UNKNOWN_ID
    likely: list[Token] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of one event. ``tool_calls``: OpenAI's deltas. ``timings``: llama.cpp's times in ms."""

    text: str = ""
    reasoning: str = ""
    tokens: list[Token] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None
    stopped_by: str | None = None
    usage: tuple[int, int] | None = None
    timings: dict[str, float] = field(default_factory=dict)


def read_all(events: Sequence[bytes], ids: Sequence[int] = ()) -> list[Piece]:
    """Read the events of a chat or a completion with a single choice.

    ``ids``: the token ids of all events, if the engine reported them. Raises ModelFailed for an error event.
    """
    pieces = [read(event) for event in events]
    if len(ids) == sum(len(piece.tokens) for piece in pieces):
        left = iter(ids)
        for piece in pieces:
            piece.tokens[:] = [replace(token, id=next(left)) for token in piece.tokens]
    return pieces


def read(event: bytes) -> Piece:
    """Read one event. Raises ModelFailed for an error event."""
    document = orjson.loads(event)
    if (error := document.get("error")) is not None:
        raise ModelFailed(error_message(error))
    choice: dict[str, Any] = next(iter(document.get("choices") or []), {})
    delta = choice.get("delta") or choice.get("message") or {}
    return Piece(
        text=choice.get("text") or delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
        tokens=_tokens(choice.get("logprobs") or {}),
        tool_calls=delta.get("tool_calls") or [],
        finish=choice.get("finish_reason"),
        stopped_by=reason if isinstance(reason := choice.get("stop_reason"), str) else None,
        usage=_usage(document.get("usage")),
        timings=document.get("timings") or {},
    )


def error_message(error: Any) -> str:
    """Return the message of an engine's error: OpenAI's object, or plain text."""
    if isinstance(error, dict):
        error = error.get("message") or error
    return error if isinstance(error, str) else orjson.dumps(error).decode()


def _usage(usage: Any) -> tuple[int, int] | None:
    if not usage:
        return None
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


def _tokens(logprobs: dict[str, Any]) -> list[Token]:
    if (entries := logprobs.get("content")) is not None:
        return [_token(entry) for entry in entries]
    return _completion_tokens(logprobs)


def _token(entry: dict[str, Any]) -> Token:
    likely = [_token(other) for other in entry.get("top_logprobs") or []]
    return Token(entry["token"], _finite(entry.get("logprob")), entry.get("id", UNKNOWN_ID), likely)


def _completion_tokens(logprobs: dict[str, Any]) -> list[Token]:
    texts, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or []
    return [
        Token(text, _finite(value), likely=[Token(other, _finite(its)) for other, its in (top or {}).items()])
        for text, value, top in zip_longest(texts, values, tops)
        if text is not None
    ]


def _finite(value: float | None) -> float:
    """Return a log probability; 0 for None, which engines report for the first token of a prompt."""
    return 0.0 if value is None else value
