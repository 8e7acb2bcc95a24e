"""The blocking calls to language models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, overload

from typing_extensions import Self

from tidegate.client import llm
from tidegate.client.calls import Blocking
from tidegate.client.flow import Answer
from tidegate.client.llm import ChatChunk, ChatResult, Collected, Messages
from tidegate.client.llm_flows import CallOptions, EmbedCalls


class ChatStream(Iterator[ChatChunk]):
    """A streamed answer, as an iterator over its chunks. Closing it cancels the request.

    ``so_far``: the answer up to now, also after an error or after :meth:`close`. ``note``: the last comment
    that the gateway sent, for example the request's position in the queue.
    """

    def __init__(self, answer: Answer, lines: Generator[str, None, None]) -> None:
        self._answer = answer
        self._lines = lines
        self.request_id = answer.headers.get("x-request-id") or ""
        self._collected = Collected(self.request_id, answer.headers.get("x-feedback-id") or "")
        self.note = ""

    def __next__(self) -> ChatChunk:
        for line in self._lines:
            if line.startswith(":"):
                self.note = line[1:].strip()
            elif (chunk := llm.read_chunk(line)) is not None:
                self._collected.add(chunk)
                return chunk
        raise StopIteration

    @property
    def so_far(self) -> ChatResult:
        """Return the answer up to now."""
        return self._collected.result()

    def result(self) -> ChatResult:
        """Read the stream to its end and return the whole answer."""
        for _ in self:
            pass
        return self.so_far

    def close(self) -> None:
        """Cancel the request if it still runs, and free the connection."""
        self._lines.close()
        self._answer.live.close()  # `_lines` closes the response only if a line was read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LlmCalls(EmbedCalls, Blocking):
    """The calls to language models that :class:`tidegate.Client` has."""

    @abstractmethod
    def _lines(self, answer: Answer) -> Generator[str, None, None]: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatStream: ...

    def chat(
        self,
        model: str,
        messages: Messages,
        *,
        stream: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatResult | ChatStream:
        """Send a conversation to a language model and return its answer.

        ``messages``: a text, or a list of ``{"role": ..., "content": ...}``. ``options``: fields of OpenAI's
        request, for example ``max_tokens``, ``temperature``, ``tools`` or ``response_format``, and fields
        that only the engine supports.

        With ``stream=True``, return a :class:`ChatStream`, an iterator over the chunks of the answer. Then
        ``timeout_s`` limits the wait for each event, and not the whole call. Errors are those of
        :meth:`infer`. In a stream, an error can come after some chunks.
        """
        call = CallOptions(timeout_s, request_id, headers)
        body = llm.chat_body(model, messages, stream, options)
        return self._stream(llm.CHAT, body, call) if stream else self._result(llm.CHAT, body, call)

    @overload
    def complete(
        self,
        model: str,
        prompt: str | Sequence[str] | Sequence[int],
        *,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatResult: ...

    @overload
    def complete(
        self,
        model: str,
        prompt: str | Sequence[str] | Sequence[int],
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatStream: ...

    def complete(
        self,
        model: str,
        prompt: str | Sequence[str] | Sequence[int],
        *,
        stream: bool = False,
        timeout_s: float | None = None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        **options: Any,
    ) -> ChatResult | ChatStream:
        """Continue a text, without a chat template. The arguments are those of :meth:`chat`."""
        call = CallOptions(timeout_s, request_id, headers)
        body = llm.completion_body(model, prompt, stream, options)
        return (
            self._stream(llm.COMPLETIONS, body, call) if stream else self._result(llm.COMPLETIONS, body, call)
        )

    def _result(self, path: str, body: bytes, call: CallOptions) -> ChatResult:
        return self._run(self._llm.result(path, body, call))

    def _stream(self, path: str, body: bytes, call: CallOptions) -> ChatStream:
        answer = self._run(self._llm.opened(path, body, call))
        return ChatStream(answer, self._lines(answer))
