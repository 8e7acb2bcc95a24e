"""The requests and answers of language models (OpenAI's API). Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from tidegate.client.errors import BadAnswer, from_openai
from tidegate.client.flow import Answer

Document = dict[str, Any]
Messages = str | Sequence[Mapping[str, Any]]

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class Usage:
    """The engine's counts of a request's tokens. ``prompt_tokens`` include ``cached_tokens``."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Return the number of tokens in prompt and answer together."""
        return self.prompt_tokens + self.completion_tokens

    def document(self) -> dict[str, int]:
        """Return the counts by name."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens,
            "total_tokens": self.total_tokens,
        }

    @classmethod
    def read(cls, document: Any) -> Usage | None:
        """Return the counts in ``document``, or None if it is not a JSON object.

        ``document``: the member ``usage`` of an answer or of an event.
        """
        if not isinstance(document, dict):
            return None
        details = document.get("prompt_tokens_details") or {}
        return cls(
            int(document.get("prompt_tokens") or 0),
            int(document.get("completion_tokens") or 0),
            int(details.get("cached_tokens") or 0),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a prompt. ``message`` is the message to append to a conversation."""

    index: int
    text: str
    finish_reason: str | None
    message: Document = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ChatResult:
    """The answer of a language model.

    ``document``: the whole answer, as OpenAI's API defines it. ``feedback_id``: the id under which feedback
    on this answer is reported; empty if the endpoint collects no feedback.
    """

    choices: list[Choice]
    usage: Usage | None
    model: str
    id: str
    request_id: str
    document: Document = field(default_factory=dict, repr=False)
    feedback_id: str = ""

    @property
    def text(self) -> str:
        """Return the text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def message(self) -> Document:
        """Return the first choice as the message to append to the conversation."""
        return self.choices[0].message if self.choices else {"role": "assistant", "content": ""}

    @property
    def tool_calls(self) -> list[Document]:
        """Return the tool calls of the first choice."""
        return list(self.message.get("tool_calls") or [])

    @property
    def finish_reason(self) -> str | None:
        """Return the reason why the first choice ended: ``stop``, ``length``, ``tool_calls`` or another."""
        return self.choices[0].finish_reason if self.choices else None


@dataclass(frozen=True, slots=True)
class ChatChunk:
    """A piece of a streamed answer. The last chunk has the usage and no text.

    ``delta``: what this chunk adds to the message. ``document``: the whole event. ``reasoning``: text that
    the engine marks as thinking.
    """

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    reasoning: str = ""
    delta: Document = field(default_factory=dict, repr=False)
    document: Document = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors, one row for each text. ``document`` is the whole answer."""

    vectors: npt.NDArray[np.float32]
    usage: Usage | None
    model: str
    document: Document = field(default_factory=dict, repr=False)


def chat_body(model: str, messages: Messages, stream: bool, options: Mapping[str, Any]) -> bytes:
    """Return the body of a chat. A string becomes one message of the user."""
    given = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return _body({"model": model, "messages": given}, stream, options)


def completion_body(model: str, prompt: Any, stream: bool, options: Mapping[str, Any]) -> bytes:
    """Return the body of a completion."""
    return _body({"model": model, "prompt": prompt}, stream, options)


def embedding_body(model: str, texts: str | Sequence[str], options: Mapping[str, Any]) -> bytes:
    """Return the body of a request for embeddings."""
    return _body(
        {"model": model, "input": [texts] if isinstance(texts, str) else list(texts)}, False, options
    )


def _body(document: Document, stream: bool, options: Mapping[str, Any]) -> bytes:
    if stream:
        document |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(document | {key: value for key, value in options.items() if value is not None})


def read_result(answer: Answer) -> ChatResult:
    """Return the result in an answer of a chat or a completion. Raise BadAnswer if it is malformed."""
    document = _document(answer.body)
    choices = []
    for given in document.get("choices") or ():
        message = given.get("message") or {"role": "assistant", "content": given.get("text") or ""}
        text = str(message.get("content") or "")
        choices.append(Choice(int(given.get("index") or 0), text, given.get("finish_reason"), message))
    return ChatResult(
        choices,
        Usage.read(document.get("usage")),
        str(document.get("model") or ""),
        str(document.get("id") or ""),
        answer.headers.get("x-request-id") or "",
        document,
        answer.headers.get("x-feedback-id") or "",
    )


def read_embeddings(answer: Answer) -> Embeddings:
    """Return the vectors in an answer, in the order of the texts. Raise BadAnswer if there are none."""
    document = _document(answer.body)
    try:
        rows = sorted(document["data"], key=lambda row: int(row["index"]))
        vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"The answer has no embeddings: {error}.") from None
    return Embeddings(vectors, Usage.read(document.get("usage")), str(document.get("model") or ""), document)


def read_chunk(line: str) -> ChatChunk | None:
    """Return the chunk in a line of a stream, or None if the line has no chunk.

    If the line contains the error that ended the stream, raise this error. Raise BadAnswer for a malformed
    line.
    """
    if not line.startswith("data:"):
        return None  # an empty line between events, or a comment
    data = line[5:].strip()
    if data == "[DONE]":
        return None
    event = _document(data.encode())
    if event.get("error"):
        raise from_openai(event)
    usage = Usage.read(event.get("usage"))
    choices = event.get("choices") or ()
    if not choices:
        return ChatChunk(usage=usage, document=event)
    first = choices[0]
    delta = first.get("delta") or {}
    return ChatChunk(
        text=str(delta.get("content") or first.get("text") or ""),
        index=int(first.get("index") or 0),
        finish_reason=first.get("finish_reason"),
        usage=usage,
        reasoning=str(delta.get("reasoning_content") or delta.get("reasoning") or ""),
        delta=delta,
        document=event,
    )


@dataclass(slots=True)
class Collected:
    """Collect the chunks of a stream, and return the answer so far as one result."""

    request_id: str = ""
    feedback_id: str = ""
    usage: Usage | None = None
    model: str = ""
    id: str = ""
    _text: dict[int, list[str]] = field(default_factory=dict)
    _calls: dict[int, dict[int, Document]] = field(default_factory=dict)
    _ends: dict[int, str | None] = field(default_factory=dict)

    def add(self, chunk: ChatChunk) -> None:
        """Add the next chunk."""
        self.usage = chunk.usage or self.usage
        self.model = self.model or str(chunk.document.get("model") or "")
        self.id = self.id or str(chunk.document.get("id") or "")
        if not chunk.document.get("choices"):
            return
        self._text.setdefault(chunk.index, []).append(chunk.text)
        self._ends[chunk.index] = chunk.finish_reason or self._ends.get(chunk.index)
        for call in chunk.delta.get("tool_calls") or ():
            _merge(self._calls.setdefault(chunk.index, {}), call)

    def result(self) -> ChatResult:
        """Return the answer up to now."""
        choices = []
        for index in sorted(self._text):
            text = "".join(self._text[index])
            message: Document = {"role": "assistant", "content": text}
            if calls := self._calls.get(index):
                message["tool_calls"] = [calls[at] for at in sorted(calls)]
            choices.append(Choice(index, text, self._ends.get(index), message))
        return ChatResult(
            choices, self.usage, self.model, self.id, self.request_id, feedback_id=self.feedback_id
        )


def _merge(calls: dict[int, Document], piece: Mapping[str, Any]) -> None:
    """Add a piece of a tool call. The name arrives once, the arguments arrive in pieces."""
    call = calls.setdefault(
        int(piece.get("index") or 0),
        {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
    )
    call["id"] = piece.get("id") or call["id"]
    told = piece.get("function") or {}
    call["function"]["name"] = told.get("name") or call["function"]["name"]
    call["function"]["arguments"] += told.get("arguments") or ""


def _document(body: bytes) -> Document:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise BadAnswer("The answer is not a JSON object; is this the URL of a Tidegate gateway?")
    return found
