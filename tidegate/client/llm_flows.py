"""The flows (:mod:`tidegate.client.flow`) of calls to language models, for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.client import llm
from tidegate.client.calls import Call
from tidegate.client.core import Core
from tidegate.client.flow import Answer, Flow


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The options of a call besides its body. ``timeout_s`` None means the client's timeout."""

    timeout_s: float | None = None
    request_id: str | None = None
    headers: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class LlmFlows:
    """The flows of chats, completions and embeddings."""

    core: Core

    def result(self, path: str, body: bytes, options: CallOptions) -> Flow[llm.ChatResult]:
        """Return the whole answer of a chat or a completion."""
        return llm.read_result((yield from self.send(path, body, options)))

    def opened(self, path: str, body: bytes, options: CallOptions) -> Flow[Answer]:
        """Send a request and return the answer, whose stream of events is not read yet."""
        return (yield from self.send(path, body, options, stream=True))

    def embeddings(
        self, model: str, texts: str | Sequence[str], more: Mapping[str, Any], options: CallOptions
    ) -> Flow[llm.Embeddings]:
        """Return the vectors of texts."""
        body = llm.embedding_body(model, texts, more)
        return llm.read_embeddings((yield from self.send(llm.EMBEDDINGS, body, options)))

    def send(self, path: str, body: bytes, options: CallOptions, *, stream: bool = False) -> Flow[Answer]:
        """Send a request and return its answer. With ``stream``, the answer's body is not read yet."""
        headers = {"Content-Type": "application/json", **(options.headers or {})}
        if stream:
            headers["Accept"] = "text/event-stream"
        if options.request_id is not None:
            headers["X-Request-Id"] = options.request_id
        limit = self.core.timeout_s if options.timeout_s is None else options.timeout_s
        answer: Answer = yield from self.core.caller.call(
            "POST", path, timeout_s=limit, headers=headers, content=body, stream=stream
        )
        return answer


class EmbedCalls:
    """The call for embeddings, which both clients have."""

    _llm: LlmFlows

    @Call
    def embed(
        self,
        /,
        model: str,
        texts: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Flow[llm.Embeddings]:
        """Return :class:`Embeddings`: a vector for each text, as one array of floats.

        Errors are those of :meth:`infer`.
        """
        return self._llm.embeddings(model, texts, options, CallOptions(timeout_s, request_id, headers))
