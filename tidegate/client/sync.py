"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal

import httpx
import numpy.typing as npt
from typing_extensions import Self

from tidegate.client import address, http
from tidegate.client.batches import BatchCalls, BatchItem, read_item
from tidegate.client.calls import Blocking
from tidegate.client.core import Version
from tidegate.client.flow import Alone, Answer, Flow, Send, Sleep, Step, T, driven
from tidegate.client.jobs import Document, JobCalls, JobOptions
from tidegate.client.llm_sync import LlmCalls
from tidegate.client.result import InferResult
from tidegate.client.shared_calls import SharedCalls
from tidegate.client.streams import read_line
from tidegate.client.uploads import UploadCalls


class JobHandle(JobCalls, Blocking):
    """A submitted job. ``document`` is its last known state."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document, client._jobs)
        self._client = client

    def retry(self) -> JobHandle:
        """Submit a failed job's request again, as a new job. Raise Conflict if the job has not failed."""
        return JobHandle(self._client, self._client._run(self._client._jobs.retry(self.id)))

    def _run(self, flow: Flow[T]) -> T:
        return self._client._run(flow)


class BatchHandle(BatchCalls, Blocking):
    """A submitted batch. ``document`` is its last known state."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document, client._batches)
        self._client = client

    def results(self, timeout_s: float | None = None) -> Generator[BatchItem, None, None]:
        """Wait until the batch has ended. Then yield the outcome of each request, in the requests' order.

        Raise DeadlinePassed if the batch has not ended after ``timeout_s`` seconds (None: no limit).
        """
        answer = self._client._run(self._client._batches.results(self.id, timeout_s))
        for line in self._client._lines(answer):
            if line:
                yield read_item(line)

    def _run(self, flow: Flow[T]) -> T:
        return self._client._run(flow)


class Client(SharedCalls, LlmCalls, UploadCalls):
    """A client that calls models through a gateway. It reuses connections; threads can share it.

    ``url``: the gateway's URL. The default is ``TIDEGATE_GATEWAY_URL``. If this variable is not set, the
    client uses the stack that the command line uses (``tidegate context``), with the stack's credential.
    ``api_key``: the default is ``TIDEGATE_API_KEY``.

    ``timeout_s`` limits each call, including its retries. ``retries``: the highest number of retries of a
    call. A call is retried after a failed connection, and after a 429 or 503 whose ``Retry-After`` ends
    before the deadline. Use 0 for models that must not run twice. Errors are those of
    :mod:`tidegate.client.errors`.
    """

    def __init__(
        self,
        url: str | None = None,
        timeout_s: float = 30.0,
        api_key: str | None = None,
        *,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(timeout_s, retries)
        found = address.find(url, api_key)
        self.url = found.url
        self._alone = threading.Lock()
        self._http = httpx.Client(**found.options(), transport=transport)

    def submit(
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
    ) -> JobHandle:
        """Submit a job for ``model``. Return its handle when the job is durable.

        Inputs and errors are those of :meth:`infer`. ``timeout_s`` limits the submission. ``ttl_s``: the
        seconds until the job expires. ``webhook``: the URL that gets the result when the job ends. If your
        program could submit the same call twice, for example after a crash, pass an ``idempotency_key``. Then
        both calls get the same job.
        """
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
        return JobHandle(self, self._run(flow))

    def stream(
        self,
        model: str,
        inputs: Mapping[str, npt.ArrayLike] | npt.ArrayLike,
        *,
        version: Version = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> Generator[InferResult, None, None]:
        """Run a model that sends many answers to one request. Yield each answer as it arrives.

        Triton calls such a model decoupled. Language models are an example. Any other model sends one answer.
        ``timeout_s`` limits the wait for the first answer and for each next one. Closing the iterator cancels
        the request. Leaving the loop early closes the iterator.

        The elements of a BYTES input must be text. FP16 and BF16 tensors cannot be streamed. Errors are those
        of :meth:`infer`; they can come after some answers.
        """
        flow = self._core.stream(
            model,
            inputs,
            version=version,
            timeout_s=timeout_s,
            request_id=request_id,
            parameters=parameters,
        )
        opened = self._run(flow)
        for line in self._lines(opened.answer):
            if (answer := read_line(line, opened)) is not None:
                yield answer

    def submit_batch(
        self,
        model: str,
        requests: Iterable[Mapping[str, npt.ArrayLike] | npt.ArrayLike],
        *,
        version: Version = None,
        priority: Literal["high", "normal", "low"] | None = None,
        ttl_s: float | None = None,
        timeout_s: float | None = None,
    ) -> BatchHandle:
        """Submit a batch: many inputs for ``model``, each as for :meth:`infer`. Return its handle.

        The batch is durable: it continues without this process. All requests are sent as JSON in one call, so
        they must fit into memory. ``tidegate batch`` can send a file of any size. Each request expires
        ``ttl_s`` seconds after it was queued. See ``docs/jobs.md``.
        """
        flow = self._batches.submit(
            model, requests, version=version, priority=priority, ttl_s=ttl_s, timeout_s=timeout_s
        )
        return BatchHandle(self, self._run(flow))

    def batch(self, id: str) -> BatchHandle:
        """Return the handle of a batch by its id. Raise NotFound for an unknown id."""
        return BatchHandle(self, self._run(self._batches.status(id)))

    def job(self, id: str) -> JobHandle:
        """Return the handle of a job by its id. Raise NotFound for an unknown id."""
        return JobHandle(self, self._run(self._jobs.status(id)))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        return driven(flow, self._do)

    def _lines(self, answer: Answer) -> Generator[str, None, None]:
        """Yield the lines of an open response, then close it."""
        try:
            yield from answer.live.iter_lines()
        except httpx.HTTPError as error:
            raise http.meaning(error, "The gateway", self.url) from None
        finally:
            answer.live.close()

    def _do(self, step: Step) -> Any:
        match step:
            case Sleep():
                time.sleep(step.seconds)
            case Alone():
                with self._alone:
                    return self._run(step.flow)
            case Send():
                try:
                    request = http.request_of(self._http, step)
                    response = self._http.send(request, stream=step.stream)
                    if step.stream and response.status_code < 400:
                        return http.open_answer_of(response)
                    response.read()
                    return http.answer_of(response)
                except httpx.HTTPError as error:
                    raise http.meaning(error, "The gateway", self.url) from None
        return None
