"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Literal

import httpx
import numpy.typing as npt
from typing_extensions import Self

from tidegate.client import address, http
from tidegate.client.batches import BatchFlows, BatchHandleBase, BatchItem, read_item
from tidegate.client.catalogue import AsyncCatalogueCalls, CatalogueFlows
from tidegate.client.core import Core, Metadata, Version
from tidegate.client.feedback import FeedbackFlows, item_of
from tidegate.client.flow import Alone, Answer, Caller, Flow, Send, Sleep, Step, T
from tidegate.client.jobs import Document, Handle, JobFlows, JobOptions
from tidegate.client.llm import ChatResult
from tidegate.client.llm_aio import AsyncLlmCalls
from tidegate.client.llm_flows import LlmFlows
from tidegate.client.quality import AsyncQualityCalls, QualityFlows
from tidegate.client.result import InferResult
from tidegate.client.streams import read_line
from tidegate.client.traffic import AsyncTrafficCalls, TrafficFlows
from tidegate.client.uploads import AsyncUploadCalls, UploadFlows
from tidegate.client.verification import AsyncVerificationCalls, VerificationFlows
from tidegate.kernel.errors import TidegateError


class AsyncJobHandle(Handle):
    """A submitted job, for asyncio. ``document`` is its last known state."""

    def __init__(self, client: AsyncClient, document: Document) -> None:
        super().__init__(document)
        self._client = client

    async def status(self) -> str:
        """Fetch the status: queued, running, succeeded, failed, cancelled or expired."""
        return await self._heard(self._client._jobs.status(self.id))

    async def wait(self, timeout_s: float | None = None) -> str:
        """Wait for the end and return the status. Raise DeadlinePassed after ``timeout_s`` (None: never)."""
        return await self._heard(self._client._jobs.wait(self.id, timeout_s))

    async def result(self, timeout_s: float | None = None) -> InferResult:
        """Wait for the result and return it. It can be fetched again.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: never), or the job's own error: ModelFailed,
        Conflict if it was cancelled, DeadlinePassed if it expired.
        """
        return await self._client._run(self._client._jobs.result(self.id, timeout_s))

    async def cancel(self) -> str:
        """Cancel the job and return its status. The status is not ``cancelled`` if the job ended first."""
        return await self._heard(self._client._jobs.cancel(self.id))

    async def retry(self) -> AsyncJobHandle:
        """Submit a failed job's request again, as a new job. Raise Conflict if the job has not failed."""
        return AsyncJobHandle(self._client, await self._client._run(self._client._jobs.retry(self.id)))

    async def _heard(self, flow: Flow[Document]) -> str:
        self.document = await self._client._run(flow)
        return str(self.document["status"])


class AsyncBatchHandle(BatchHandleBase):
    """A submitted batch, for asyncio. ``document`` is its last known state."""

    def __init__(self, client: AsyncClient, document: Document) -> None:
        super().__init__(document)
        self._client = client

    async def status(self) -> str:
        """Fetch the status: ``running``, ``cancelling``, ``completed``, ``cancelled`` or ``failed``."""
        return await self._heard(self._client._batches.status(self.id))

    async def wait(self, timeout_s: float | None = None) -> str:
        """Wait for the end and return the status. Raise DeadlinePassed after ``timeout_s`` (None: never)."""
        return await self._heard(self._client._batches.wait(self.id, timeout_s))

    async def results(self, timeout_s: float | None = None) -> AsyncGenerator[BatchItem, None]:
        """Wait for the end, then yield the outcome of each request, in the order of the requests.

        Raise DeadlinePassed if the batch has not ended after ``timeout_s`` seconds (None: never).
        """
        answer = await self._client._run(self._client._batches.results(self.id, timeout_s))
        async with aclosing(self._client._lines(answer)) as lines:
            async for line in lines:
                if line:
                    yield read_item(line)

    async def cancel(self) -> str:
        """Cancel the requests that have not ended. Return the batch's status."""
        return await self._heard(self._client._batches.cancel(self.id))

    async def _heard(self, flow: Flow[Document]) -> str:
        self.document = await self._client._run(flow)
        return str(self.document["status"])


class AsyncClient(
    AsyncLlmCalls,
    AsyncTrafficCalls,
    AsyncQualityCalls,
    AsyncUploadCalls,
    AsyncCatalogueCalls,
    AsyncVerificationCalls,
):
    """:class:`tidegate.Client` for asyncio: the same arguments, the same calls, awaited.

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
        found = address.find(url, api_key)
        self.url = found.url
        self._core = Core(timeout_s, Caller(retries))
        self._jobs = JobFlows(self._core)
        self._batches = BatchFlows(self._core)
        self._llm = LlmFlows(self._core)
        self._feedback = FeedbackFlows(self._core)
        self._traffic = TrafficFlows(self._core)
        self._quality = QualityFlows(self._core)
        self._uploads = UploadFlows(self._core)
        self._catalogue = CatalogueFlows(self._core)
        self._verification = VerificationFlows(self._core)
        self._alone = asyncio.Lock()
        self._http = httpx.AsyncClient(**found.options(), transport=transport)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        *,
        version: Version = None,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> InferResult:
        """Run ``model`` on arrays; see :meth:`tidegate.Client.infer`."""
        return await self._run(
            self._core.infer(
                model,
                inputs,
                version=version,
                outputs=outputs,
                timeout_s=timeout_s,
                request_id=request_id,
                parameters=parameters,
            )
        )

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

        Use ``contextlib.aclosing`` to cancel the request as soon as the loop ends.
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
        """Return the handle of a batch by its id. Raise NotFound."""
        return AsyncBatchHandle(self, await self._run(self._batches.status(id)))

    async def job(self, id: str) -> AsyncJobHandle:
        """Return the handle of a job by its id. Raise NotFound."""
        return AsyncJobHandle(self, await self._run(self._jobs.status(id)))

    async def feedback(
        self,
        answer: InferResult | ChatResult | Handle | str | None = None,
        *,
        score: float | None = None,
        reward: float | None = None,
        label: str | int | float | bool | None = None,
        metric: str | None = None,
        value: float | str | None = None,
        at: datetime | float | None = None,
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
    ) -> Document:
        """Report how good an answer was; see :meth:`tidegate.Client.feedback`."""
        outcomes = {"score": score, "reward": reward, "label": label, "metric": metric, "value": value}
        return await self._run(self._feedback.one(item_of(answer, idempotency_key, outcomes, at), timeout_s))

    async def feedback_many(
        self, items: Iterable[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> list[Document]:
        """Report many outcomes; see :meth:`tidegate.Client.feedback_many`."""
        return await self._run(self._feedback.many(items, timeout_s))

    async def metadata(
        self, model: str, *, version: Version = None, timeout_s: float | None = None
    ) -> Metadata:
        """Return a model's name, versions, platform, inputs and outputs. Raise NotFound."""
        return await self._run(self._core.metadata(model, version=version, timeout_s=timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[Metadata]:
        """Return every model that can be called, each with ``name``, ``version`` and ``state``."""
        return await self._run(self._core.models(timeout_s=timeout_s))

    async def costs(
        self,
        *,
        by: str = "deployment",
        since: float | None = None,
        until: float | None = None,
        deployment: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Return what replicas cost; see :meth:`tidegate.Client.costs`."""
        return await self._run(self._core.costs(by, since, until, deployment, timeout_s))

    async def is_ready(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> bool:
        """Return True if the model accepts requests, even if it must start first. Unknown name: False."""
        return await self._run(self._core.is_ready(model, version=version, timeout_s=timeout_s))

    async def wait_ready(self, model: str, timeout_s: float = 120.0, *, version: Version = None) -> None:
        """Wait until the model is ready. Raise DeadlinePassed after ``timeout_s`` seconds."""
        await self._run(self._core.wait_ready(model, version=version, timeout_s=timeout_s))

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
