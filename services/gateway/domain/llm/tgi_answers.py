"""Translate an engine's events into the answers of TGI (Text Generation Inference)."""

from __future__ import annotations

from typing import Any

import orjson

from services.gateway.domain.llm.engine_events import Piece, Token
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.llm.tgi_requests import Generation
from tidegate.kernel import errors
from tidegate.kernel.errors import TidegateError

# TGI's type for each of Tidegate's errors. Clients raise a separate exception for each type.
_TYPES: dict[type[TidegateError], str] = {
    errors.BadRequest: "validation",
    errors.PayloadTooLarge: "validation",
    errors.TooMany: "overloaded",
    errors.Overloaded: "overloaded",
    errors.NoCapacity: "overloaded",
    errors.ModelFailed: "generation",
    errors.DeadlinePassed: "incomplete_generation",
}


class TgiAnswer:
    """Build TGI's answer to one request from the engine's events. ``add`` returns the events to send.

    In TGI, the event of the last token also has the whole text. But an engine reports the end of the answer
    only after the gateway has sent the last token. So the gateway sends the whole text in one more event,
    with an empty special token. If the answer reaches ``max_new_tokens``, the gateway knows the last token
    before it sends it. Then the event of this token has the whole text.
    """

    def __init__(self, request: Generation) -> None:
        self._request = request
        self._text: list[str] = []
        self._tokens: list[dict[str, Any]] = []
        self._tops: list[list[dict[str, Any]]] = []
        self._held: dict[str, Any] | None = None
        self._finish = "length"
        self._usage: tuple[int, int] | None = None

    def add(self, piece: Piece) -> list[bytes]:
        """Add one event of the engine. Return the events to send."""
        self._usage = piece.usage or self._usage
        if piece.finish is not None:
            self._finish = _finish(piece)
        if not piece.text:
            return []
        self._text.append(piece.text)
        return [event for token in _whole(piece) if (event := self._event(token)) is not None]

    def _event(self, token: Token) -> bytes | None:
        shown, tops = _token(token), [_token(other) for other in token.likely][: self._request.top_tokens]
        self._tokens.append(shown)
        self._tops.append(tops)
        event = self._stream_event(len(self._tokens), shown, tops)
        if len(self._tokens) == self._request.max_new_tokens:
            self._held = event
            return None
        return orjson.dumps(event)

    def _stream_event(self, index: int, token: dict[str, Any], tops: list[dict[str, Any]]) -> dict[str, Any]:
        event = {"index": index, "token": token, "generated_text": None, "details": None}
        return event | ({"top_tokens": tops} if tops else {})

    def last_event(self) -> bytes:
        """Return the last event of a stream, with the whole text."""
        special = {"id": -1, "text": "", "logprob": 0.0, "special": True}
        event = self._held or self._stream_event(len(self._tokens) + 1, special, [])
        prompt_tokens = self._usage[0] if self._usage is not None else 0
        details = self._counts() | {"input_length": prompt_tokens}
        return orjson.dumps(event | {"generated_text": self._generated(), "details": details})

    def whole(self) -> dict[str, Any]:
        """Return the answer to a request that is not a stream."""
        answer: dict[str, Any] = {"generated_text": self._generated()}
        if self._request.details:
            details = self._counts() | {"prefill": [], "tokens": self._tokens}
            answer["details"] = details | ({"top_tokens": self._tops} if self._request.top_tokens else {})
        return answer

    def _generated(self) -> str:
        return (self._request.prompt if self._request.full_text else "") + "".join(self._text)

    def _counts(self) -> dict[str, Any]:
        tokens = self._usage[1] if self._usage is not None else len(self._tokens)
        return {"finish_reason": self._finish, "generated_tokens": tokens, "seed": self._request.seed}


def _whole(piece: Piece) -> list[Token]:
    """Return a piece's tokens if their texts make up the piece's text; else one token with the whole text.

    Several tokens may form one character. Then none of them has a text of its own.
    """
    if piece.tokens and "".join(token.text for token in piece.tokens) == piece.text:
        return piece.tokens
    last = piece.tokens[-1] if piece.tokens else Token("", 0.0)
    return [Token(piece.text, sum(token.logprob for token in piece.tokens), last.id)]


def _token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": False}


def _finish(piece: Piece) -> str:
    if piece.finish == "length":
        return "length"
    return "stop_sequence" if piece.stopped_by is not None else "eos_token"


def error_type(error: TidegateError) -> str:
    """Return TGI's type of an error."""
    if isinstance(error, EngineRefused):
        return "overloaded" if error.status == 429 else "validation" if error.status < 500 else "generation"
    found = (_TYPES[cls] for cls in type(error).__mro__ if cls in _TYPES)
    return next(found, error.reason)


def info(model: str, context: int | None, slots: int, version: str) -> dict[str, Any]:
    """Return the answer of ``/info``. ``context``: the context length in tokens, if known."""
    return {
        "model_id": model,
        "model_sha": None,
        "model_dtype": None,
        "model_device_type": None,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": slots,
        "max_best_of": 1,
        "max_stop_sequences": 4,
        "max_input_tokens": context - 1 if context else None,
        "max_total_tokens": context,
        "max_client_batch_size": 1,
        "router": "tidegate",
        "version": version,
    }
