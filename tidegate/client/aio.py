"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

import httpx
import numpy.typing as npt
from typing_extensions import Self

from tidegate.client import address, http
from tidegate.client.batches import BatchCalls, BatchItem, read_item
from tidegate.client.calls import Awaited
from tidegate.client.core import Version
from tidegate.client.flow import Alone, Answer, Flow, Send, Sleep, Step, T
from tidegate.client.jobs import Document, JobCalls, JobOptions
from tidegate.client.llm_aio import AsyncLlmCalls
from tidegate.client.result import InferResult
from tidegate.client.shared_calls import SharedCalls
from tidegate.client.streams import read_line
from tidegate.client.uploads import AsyncUploadCalls
from tidegate.kernel.errors import TidegateError


class AsyncJobHandle(JobCalls, Awaited):
    """A submitted job, for asyncio. ``document`` is its last known state."""

    def __init__(self, client: AsyncClient, document: Document) -> None:
        super().__init__(document, client._jobs)
        self._client = client

    async def retry(self) -> AsyncJobHandle:
        """Submit a failed job's request again, as a new job. Raise Conflict if the job has not failed."""
        return AsyncJobHandle(self._client, await self._client._run(self._client._jobs.retry(self.id)))

    async def _run(self, flow: Flow[T]) -> T:
        return await self._client._run(flow)


class AsyncBatchHandle(BatchCalls, Awaited):
    """A submitted batch, for asyncio. ``document`` is its last known state."""

    def __init__(self, client: AsyncClient, document: Document) -> None:
        super().__init__(document, client._batches)
        self._client = client

    async def results(self, timeout_s: float | None = None) -> AsyncGenerator[BatchItem, None]:
        """Wait until the batch has ended. Then yield the outcome of each request, in the requests' order.

        Raise DeadlinePassed if the batch has not ended after ``timeout_s`` seconds (None: no limit).
        """
        answer = await self._client._run(self._client._batches.results(self.id, timeout_s))
        async with aclosing(self._client._lines(answer)) as lines:
            async for line in lines:
                if line:
                    yield read_item(line)

    async def _run(self, flow: Flow[T]) -> T:
        return await self._client._run(flow)


class AsyncClient(SharedCalls, AsyncLlmCalls, AsyncUploadCalls):
    """The client for asyncio. Its arguments and calls are those of :class:`tidegate.Client`.

    Use it for many concurrent calls: ``await asyncio.gather(*(client.infer(...) for ...))``.
    """

    def __init__(
        self,
        url: str | None = None,
        timeout_s: float = 30.0,
        api_key: str | None = None,
        *,
        retries: int = 2,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(timeout_s, retries)
        found = address.find(url, api_key)
        self.url = found.url
        self._alone = asyncio.Lock()
        self._http = httpx.AsyncClient(**found.options(), transport=transport)

    async def submit(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        *,
        version: Version = None,
        outputs: Sequence[str] | None = None,
        priority: Literal["high", "normal", "low"] | None = None,
        ttl_s: float | None = None,
        webhook: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> AsyncJobHandle:
        """Submit a job for ``model``; see :meth:`tidegate.Client.submit`."""
        options = JobOptions(priority, ttl_s, webhook, metadata, idempotency_key)
        flow = self._jobs.submit(
            model,
            inputs,
            options,
            version=version,
            outputs=outputs,
            timeout_s=timeout_s,
            request_id=request_id,
            parameters=parameters,
        )
        return AsyncJobHandle(self, await self._run(flow))

    async def stream(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        *,
        version: Version = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[InferResult, None]:
        """Yield each answer of a model as it arrives; see :meth:`tidegate.Client.stream`.

        If your loop can end before the last answer, iterate within ``contextlib.aclosing``. Then the end of
        the loop cancels the request.
        """
        flow = self._core.stream(
            model,
            inputs,
            version=version,
            timeout_s=timeout_s,
            request_id=request_id,
            parameters=parameters,
        )
        opened = await self._run(flow)
        async with aclosing(self._lines(opened.answer)) as lines:
            async for line in lines:
                if (answer := read_line(line, opened)) is not None:
                    yield answer

    async def submit_batch(
        self,
        model: str,
        requests: Iterable[Mapping[str, npt.ArrayLike] | npt.ArrayLike],
        *,
        version: Version = None,
        priority: Literal["high", "normal", "low"] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncBatchHandle:
        """Submit a batch for ``model``; see :meth:`tidegate.Client.submit_batch`."""
        flow = self._batches.submit(
            model, requests, version=version, priority=priority, ttl_s=ttl_s, timeout_s=timeout_s
        )
        return AsyncBatchHandle(self, await self._run(flow))

    async def batch(self, id: str) -> AsyncBatchHandle:
        """Return the handle of a batch by its id. Raise NotFound for an unknown id."""
        return AsyncBatchHandle(self, await self._run(self._batches.status(id)))

    async def job(self, id: str) -> AsyncJobHandle:
        """Return the handle of a job by its id. Raise NotFound for an unknown id."""
        return AsyncJobHandle(self, await self._run(self._jobs.status(id)))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._do(step)
                except TidegateError as error:
                    problem = error
                else:
                    step = flow.send(result)
                    continue
                step = flow.throw(problem)
        except StopIteration as done:
            value: T = done.value
            return value

    async def _lines(self, answer: Answer) -> AsyncGenerator[str, None]:
        """Yield the lines of an open response, then close it."""
        try:
            async for line in answer.live.aiter_lines():
                yield line
        except httpx.HTTPError as error:
            raise http.meaning(error, "The gateway", self.url) from None
        finally:
            await answer.live.aclose()

    async def _do(self, step: Step) -> Any:
        match step:
            case Sleep():
                await asyncio.sleep(step.seconds)
            case Alone():
                async with self._alone:
                    return await self._run(step.flow)
            case Send():
                try:
                    request = http.request_of(self._http, step)
                    response = await self._http.send(request, stream=step.stream)
                    if step.stream and response.status_code < 400:
                        return http.open_answer_of(response)
                    await response.aread()
                    return http.answer_of(response)
                except httpx.HTTPError as error:
                    raise http.meaning(error, "The gateway", self.url) from None
        return None
