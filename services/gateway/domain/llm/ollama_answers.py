"""Translate an engine's events into the answers of Ollama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from services.gateway.domain.llm.engine_events import Piece, Token
from services.gateway.domain.llm.ollama_requests import OllamaCall

_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Durations:
    """The times of one request in nanoseconds, as the gateway measures them.

    All times begin when the request arrives. ``load``: until an engine has the request. This includes the
    time in a queue and the time of a cold start. ``first``: until the first event. ``total``: until the end
    of the answer.
    """

    load: int
    first: int
    total: int


class OllamaAnswer:
    """Build Ollama's answer to one request from the engine's events. ``add`` returns the lines to send."""

    def __init__(self, call: OllamaCall) -> None:
        self._call = call
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._calls: dict[int, dict[str, str]] = {}
        self._finish = "stop"
        self._usage = (0, 0)
        self._timings: dict[str, float] = {}

    def add(self, piece: Piece, now: datetime) -> list[bytes]:
        """Add one event of the engine. Return the lines to send."""
        self._usage = piece.usage or self._usage
        self._timings = piece.timings or self._timings
        self._finish = piece.finish or self._finish
        for delta in piece.tool_calls:
            self._add_call(delta)
        if not piece.text and not piece.reasoning:
            return []
        self._text.append(piece.text)
        self._thinking.append(piece.reasoning)
        logprobs = [_logprob(token) for token in piece.tokens]
        self._logprobs += logprobs
        return [self._line(now, piece.text, piece.reasoning, logprobs)]

    def _add_call(self, delta: dict[str, Any]) -> None:
        """Add a fragment of a tool call.

        Ollama sends only whole calls, so the fragments are collected until the end.
        """
        function = delta.get("function") or {}
        call = self._calls.setdefault(delta.get("index", len(self._calls)), {"name": "", "arguments": ""})
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def nothing(self, now: datetime) -> bytes:
        """Return a line without text, to send while the request waits."""
        return self._line(now, "", "", [])

    def end(self, now: datetime, durations: Durations) -> list[bytes]:
        """Return the last lines of a stream: the tool calls, then the token counts and the times."""
        calls = self._tool_calls()
        lines = [self._line(now, "", "", [], calls)] if calls else []
        return [*lines, orjson.dumps(self._frame(now, "", "", []) | self._counts(durations))]

    def whole(self, now: datetime, durations: Durations) -> dict[str, Any]:
        """Return the answer to a request that is not a stream."""
        text, thinking = "".join(self._text), "".join(self._thinking)
        frame = self._frame(now, text, thinking, self._logprobs, self._tool_calls())
        return frame | self._counts(durations)

    def _line(
        self,
        now: datetime,
        text: str,
        thinking: str,
        logprobs: Sequence[dict[str, Any]],
        calls: Sequence[dict[str, Any]] = (),
    ) -> bytes:
        return orjson.dumps(self._frame(now, text, thinking, logprobs, calls) | {"done": False})

    def _frame(
        self,
        now: datetime,
        text: str,
        thinking: str,
        logprobs: Sequence[dict[str, Any]],
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        frame: dict[str, Any] = {"model": self._call.model, "created_at": stamp(now)}
        extra = {"thinking": thinking} if thinking else {}
        if self._call.kind == "chat":
            tools = {"tool_calls": list(calls)} if calls else {}
            frame["message"] = {"role": "assistant", "content": text} | extra | tools
        else:
            frame |= {"response": text} | extra
        return frame | ({"logprobs": list(logprobs)} if logprobs else {})

    def _tool_calls(self) -> list[dict[str, Any]]:
        return [
            {"function": {"name": call["name"], "arguments": _arguments(call["arguments"])}}
            for _, call in sorted(self._calls.items())
        ]

    def _counts(self, durations: Durations) -> dict[str, Any]:
        prompt = max(durations.first - durations.load, 0)
        answer = max(durations.total - durations.first, 0)
        if self._timings:  # the engine's own times are more exact
            prompt = int(self._timings.get("prompt_ms", 0) * _MS)
            answer = int(self._timings.get("predicted_ms", 0) * _MS)
        return {
            "done": True,
            "done_reason": "length" if self._finish == "length" else "stop",
            "total_duration": durations.total,
            "load_duration": durations.load,
            "prompt_eval_count": self._usage[0],
            "prompt_eval_duration": prompt,
            "eval_count": self._usage[1],
            "eval_duration": answer,
        }


def loaded(call: OllamaCall, now: datetime) -> dict[str, Any]:
    """Return the answer to a request without a prompt.

    Clients send such a request to load or unload a model.
    """
    frame: dict[str, Any] = {"model": call.model, "created_at": stamp(now)}
    empty = {"message": {"role": "assistant", "content": ""}} if call.kind == "chat" else {"response": ""}
    return frame | empty | {"done": True, "done_reason": "unload" if call.unload else "load"}


def embeddings(model: str, answer: bytes, durations: Durations) -> dict[str, Any]:
    """Return the answer of ``/api/embed``, made from the engine's answer."""
    vectors, tokens = _vectors(answer)
    return {
        "model": model,
        "embeddings": vectors,
        "total_duration": durations.total,
        "load_duration": durations.load,
        "prompt_eval_count": tokens,
    }


def embedding(answer: bytes) -> dict[str, Any]:
    """Return the answer of the older ``/api/embeddings``, made from the engine's answer."""
    return {"embedding": _vectors(answer)[0][0]}


def _vectors(answer: bytes) -> tuple[list[list[float]], int]:
    document = orjson.loads(answer)
    entries = sorted(document["data"], key=lambda entry: entry["index"])
    tokens = (document.get("usage") or {}).get("prompt_tokens", 0)
    return [entry["embedding"] for entry in entries], tokens


def stamp(now: datetime) -> str:
    """Return a time as Ollama writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _arguments(text: str) -> Any:
    """Return a tool call's arguments as an object.

    If they are not a JSON object, wrap their text in an object.
    """
    try:
        value = orjson.loads(text or b"{}")
    except orjson.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def _logprob(token: Token) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": token.text, "logprob": token.logprob}
    if token.likely:
        entry["top_logprobs"] = [{"token": other.text, "logprob": other.logprob} for other in token.likely]
    return entry
