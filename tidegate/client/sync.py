"""The blocking client."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import httpx
import numpy.typing as npt
from typing_extensions import Self

from tidegate.client import address, http
from tidegate.client.batches import BatchFlows, BatchHandleBase, BatchItem, read_item
from tidegate.client.catalogue import CatalogueCalls, CatalogueFlows
from tidegate.client.core import Core, Metadata, Version
from tidegate.client.feedback import FeedbackFlows, item_of
from tidegate.client.flow import Alone, Answer, Caller, Flow, Send, Sleep, Step, T, driven
from tidegate.client.jobs import Document, Handle, JobFlows, JobOptions
from tidegate.client.llm import ChatResult
from tidegate.client.llm_flows import LlmFlows
from tidegate.client.llm_sync import LlmCalls
from tidegate.client.quality import QualityCalls, QualityFlows
from tidegate.client.result import InferResult
from tidegate.client.streams import read_line
from tidegate.client.traffic import TrafficCalls, TrafficFlows
from tidegate.client.uploads import UploadCalls, UploadFlows
from tidegate.client.verification import VerificationCalls, VerificationFlows


class JobHandle(Handle):
    """A submitted job. ``document`` is its last known state."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document)
        self._client = client

    def status(self) -> str:
        """Fetch the status: queued, running, succeeded, failed, cancelled or expired."""
        return self._heard(self._client._jobs.status(self.id))

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait for the end and return the status. Raise DeadlinePassed after ``timeout_s`` (None: never)."""
        return self._heard(self._client._jobs.wait(self.id, timeout_s))

    def result(self, timeout_s: float | None = None) -> InferResult:
        """Wait for the result and return it. It can be fetched again.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: never), or the job's own error: ModelFailed,
        Conflict if it was cancelled, DeadlinePassed if it expired.
        """
        return self._client._run(self._client._jobs.result(self.id, timeout_s))

    def cancel(self) -> str:
        """Cancel the job and return its status. The status is not ``cancelled`` if the job ended first."""
        return self._heard(self._client._jobs.cancel(self.id))

    def retry(self) -> JobHandle:
        """Submit a failed job's request again, as a new job. Raise Conflict if the job has not failed."""
        return JobHandle(self._client, self._client._run(self._client._jobs.retry(self.id)))

    def _heard(self, flow: Flow[Document]) -> str:
        self.document = self._client._run(flow)
        return str(self.document["status"])


class BatchHandle(BatchHandleBase):
    """A submitted batch. ``document`` is its last known state."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document)
        self._client = client

    def status(self) -> str:
        """Fetch the status: ``running``, ``cancelling``, ``completed``, ``cancelled`` or ``failed``."""
        return self._heard(self._client._batches.status(self.id))

    def wait(self, timeout_s: float | None = None) -> str:
        """Wait for the end and return the status. Raise DeadlinePassed after ``timeout_s`` (None: never)."""
        return self._heard(self._client._batches.wait(self.id, timeout_s))

    def results(self, timeout_s: float | None = None) -> Generator[BatchItem, None, None]:
        """Wait for the end, then yield the outcome of each request, in the order of the requests.

        Raise DeadlinePassed if the batch has not ended after ``timeout_s`` seconds (None: never).
        """
        answer = self._client._run(self._client._batches.results(self.id, timeout_s))
        for line in self._client._lines(answer):
            if line:
                yield read_item(line)

    def cancel(self) -> str:
        """Cancel the requests that have not ended. Return the batch's status."""
        return self._heard(self._client._batches.cancel(self.id))

    def _heard(self, flow: Flow[Document]) -> str:
        self.document = self._client._run(flow)
        return str(self.document["status"])


class Client(LlmCalls, TrafficCalls, QualityCalls, UploadCalls, CatalogueCalls, VerificationCalls):
    """A client that calls models through a gateway. It reuses connections; threads can share it.

    ``url`` is the gateway's. By default it is ``TIDEGATE_GATEWAY_URL``, else the stack that the command line
    uses (``tidegate context``), with its credential. ``api_key`` is by default ``TIDEGATE_API_KEY``.
    ``timeout_s`` limits each call, including its retries. ``retries`` limits how often a call is sent again:
    after a failed connection, or after a 429 or 503 whose ``Retry-After`` ends before the deadline. Use 0
    for models that must not run twice. Errors are those of :mod:`tidegate.client.errors`.
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
        self._alone = threading.Lock()
        self._http = httpx.Client(**found.options(), transport=transport)

    def infer(
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
        """Run ``model`` on arrays by input name, or on one array if it has a single input.

        An array of another dtype is cast if no value changes. float64 arrays and lists are rounded to the
        model's floats. Raise TypeError, with the expected datatype, for all other arrays.
        BYTES inputs are object arrays of ``bytes`` or ``str``, BF16 inputs float32 (rounded). ``outputs``
        names the outputs to return (default: all).

        Raise DeadlinePassed after ``timeout_s`` seconds, Overloaded with ``retry_after_s``, NotFound,
        BadRequest, ModelFailed with the model's own message, Unreachable if no gateway answers.
        """
        return self._run(
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

        Inputs and errors are those of :meth:`infer`; ``timeout_s`` limits the submission. The job expires
        ``ttl_s`` seconds later. ``webhook`` is called at its end. Pass an ``idempotency_key`` if the
        same call may be submitted twice, for example after a crash: both get the same job.
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
        """Run a model with many answers, such as a language model; yield each answer as it arrives.

        A model that is not decoupled has one answer. ``timeout_s`` limits the wait for the first answer and
        for each next one. Closing the iterator cancels the request; leaving the loop closes it. BYTES inputs
        are text; FP16 and BF16 cannot be streamed. Errors are those of :meth:`infer`; they may come after
        some answers.
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

        The batch is durable: it continues without this process. The requests are sent as JSON and must fit
        into memory; ``tidegate batch`` sends a file of any size. Each request expires ``ttl_s`` seconds
        after it was queued. See ``docs/jobs.md``.
        """
        flow = self._batches.submit(
            model, requests, version=version, priority=priority, ttl_s=ttl_s, timeout_s=timeout_s
        )
        return BatchHandle(self, self._run(flow))

    def batch(self, id: str) -> BatchHandle:
        """Return the handle of a batch by its id. Raise NotFound."""
        return BatchHandle(self, self._run(self._batches.status(id)))

    def job(self, id: str) -> JobHandle:
        """Return the handle of a job by its id. Raise NotFound."""
        return JobHandle(self, self._run(self._jobs.status(id)))

    def feedback(
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
        """Report how good an answer was: a score, a reward, a label, or any ``metric`` with a ``value``.

        ``answer``: a result, a job, or an id (``feedback_id``). ``idempotency_key`` names a job instead.
        ``at``: the time of the outcome. The first value of each metric counts, so a repeated call is safe.
        Raise NotFound for an unknown or old answer, Forbidden for the answer of another key.
        """
        outcomes = {"score": score, "reward": reward, "label": label, "metric": metric, "value": value}
        return self._run(self._feedback.one(item_of(answer, idempotency_key, outcomes, at), timeout_s))

    def feedback_many(
        self, items: Iterable[Mapping[str, Any]], *, timeout_s: float | None = None
    ) -> list[Document]:
        """Report many outcomes: objects with the members of ``POST /v1/feedback``, in calls of 1,000.

        Return for each item its ``index``, its ``status``, and for a refused one a ``message``.
        """
        return self._run(self._feedback.many(items, timeout_s))

    def metadata(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> Metadata:
        """Return a model's name, versions, platform, inputs and outputs. Raise NotFound."""
        return self._run(self._core.metadata(model, version=version, timeout_s=timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[Metadata]:
        """Return every model that can be called, each with ``name``, ``version`` and ``state``."""
        return self._run(self._core.models(timeout_s=timeout_s))

    def costs(
        self,
        *,
        by: str = "deployment",
        since: float | None = None,
        until: float | None = None,
        deployment: str | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Return what replicas cost, ``by`` deployment, version, endpoint or key. Needs the scope operate.

        ``since`` and ``until`` are seconds since the epoch; default: the last day. docs/costs.md explains the
        members.
        """
        return self._run(self._core.costs(by, since, until, deployment, timeout_s))

    def is_ready(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> bool:
        """Return True if the model accepts requests, even if it must start first. Unknown name: False."""
        return self._run(self._core.is_ready(model, version=version, timeout_s=timeout_s))

    def wait_ready(self, model: str, timeout_s: float = 120.0, *, version: Version = None) -> None:
        """Wait until the model is ready. Raise DeadlinePassed after ``timeout_s`` seconds."""
        self._run(self._core.wait_ready(model, version=version, timeout_s=timeout_s))

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
