"""The calls to language models for asyncio."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, overload

from typing_extensions import Self

from tidegate.client import llm
from tidegate.client.calls import Awaited
from tidegate.client.flow import Answer
from tidegate.client.llm import ChatChunk, ChatResult, Collected, Messages
from tidegate.client.llm_flows import CallOptions, EmbedCalls


class AsyncChatStream(AsyncIterator[ChatChunk]):
    """A streamed answer, for ``async for``. See :class:`tidegate.client.llm_sync.ChatStream`.

    The request is sent when the first chunk is read. If you do not read a stream to its end, close it, with
    ``async with`` or :meth:`close`: this cancels the request.
    """

    def __init__(
        self, open_: Callable[[], Awaitable[Answer]], lines: Callable[[Answer], AsyncGenerator[str, None]]
    ) -> None:
        self._open: Callable[[], Awaitable[Answer]] | None = open_
        self._lines_of = lines
        self._answer: Answer | None = None
        self._lines: AsyncGenerator[str, None] | None = None
        self._collected = Collected()
        self.request_id = ""
        self.note = ""

    async def __anext__(self) -> ChatChunk:
        if self._open is not None:
            open_, self._open = self._open, None
            self._answer = await open_()
            self._collected.request_id = self.request_id = self._answer.headers.get("x-request-id") or ""
            self._collected.feedback_id = self._answer.headers.get("x-feedback-id") or ""
            self._lines = self._lines_of(self._answer)
        if self._lines is not None:
            async for line in self._lines:
                if line.startswith(":"):
                    self.note = line[1:].strip()
                elif (chunk := llm.read_chunk(line)) is not None:
                    self._collected.add(chunk)
                    return chunk
        raise StopAsyncIteration

    @property
    def so_far(self) -> ChatResult:
        """Return the answer up to now."""
        return self._collected.result()

    async def result(self) -> ChatResult:
        """Read the stream to its end and return the whole answer."""
        async for _ in self:
            pass
        return self.so_far

    async def close(self) -> None:
        """Cancel the request if it still runs, and free the connection."""
        self._open = None
        if self._lines is not None:
            await self._lines.aclose()
        if self._answer is not None:
            await self._answer.live.aclose()  # `_lines` closes the response only if a line was read

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncLlmCalls(EmbedCalls, Awaited):
    """The calls to language models that :class:`tidegate.AsyncClient` has."""

    @abstractmethod
    def _lines(self, answer: Answer) -> AsyncGenerator[str, None]: ...

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
    ) -> Coroutine[Any, Any, ChatResult]: ...

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
    ) -> AsyncChatStream: ...

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
    ) -> Coroutine[Any, Any, ChatResult] | AsyncChatStream:
        """Send a conversation to a language model; see :meth:`tidegate.Client.chat`.

        The calling code must await the result. With ``stream=True``, it must not await. Then it must iterate:
        ``async for chunk in client.chat(...)``.
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
    ) -> Coroutine[Any, Any, ChatResult]: ...

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
    ) -> AsyncChatStream: ...

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
    ) -> Coroutine[Any, Any, ChatResult] | AsyncChatStream:
        """Continue a text, without a chat template. The arguments are those of :meth:`chat`."""
        call = CallOptions(timeout_s, request_id, headers)
        body = llm.completion_body(model, prompt, stream, options)
        return (
            self._stream(llm.COMPLETIONS, body, call) if stream else self._result(llm.COMPLETIONS, body, call)
        )

    async def _result(self, path: str, body: bytes, call: CallOptions) -> ChatResult:
        return await self._run(self._llm.result(path, body, call))

    def _stream(self, path: str, body: bytes, call: CallOptions) -> AsyncChatStream:
        return AsyncChatStream(lambda: self._run(self._llm.opened(path, body, call)), self._lines)
