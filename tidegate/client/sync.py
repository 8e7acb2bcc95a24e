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
from tidegate.client.batches import BatchFlows, BatchHandleBase, BatchItem, read_item
from tidegate.client.core import Core, Metadata, Version
from tidegate.client.flow import Alone, Answer, Caller, Flow, Send, Sleep, Step, T
from tidegate.client.jobs import Document, Handle, JobFlows, JobOptions
from tidegate.client.result import InferResult
from tidegate.client.streams import read_line
from tidegate.kernel.errors import TidegateError


class JobHandle(Handle):
    """A job that was submitted. ``document`` is what was last heard of it."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document)
        self._client = client

    def status(self) -> str:
        """``queued``, ``running``, ``succeeded``, ``failed``, ``cancelled`` or ``expired``, asked anew."""
        return self._heard(self._client._jobs.status(self.id))

    def wait(self, timeout_s: float | None = None) -> str:
        """Its status once it is over. Raises DeadlinePassed after ``timeout_s`` seconds; None waits on."""
        return self._heard(self._client._jobs.wait(self.id, timeout_s))

    def result(self, timeout_s: float | None = None) -> InferResult:
        """Its result once there is one; may be asked for again.

        Raises DeadlinePassed after ``timeout_s`` seconds (None waits on), or what went wrong with the job:
        ModelFailed, Conflict when it was cancelled, DeadlinePassed when it expired.
        """
        return self._client._run(self._client._jobs.result(self.id, timeout_s))

    def cancel(self) -> str:
        """End it; its status after that, which is another one if it had ended before."""
        return self._heard(self._client._jobs.cancel(self.id))

    def retry(self) -> JobHandle:
        """A new job with its request, if it has failed. Raises Conflict otherwise."""
        return JobHandle(self._client, self._client._run(self._client._jobs.retry(self.id)))

    def _heard(self, flow: Flow[Document]) -> str:
        self.document = self._client._run(flow)
        return str(self.document["status"])


class BatchHandle(BatchHandleBase):
    """A batch that was submitted. ``document`` is what was last heard of it."""

    def __init__(self, client: Client, document: Document) -> None:
        super().__init__(document)
        self._client = client

    def status(self) -> str:
        """``running``, ``cancelling``, ``completed``, ``cancelled`` or ``failed``, asked anew."""
        return self._heard(self._client._batches.status(self.id))

    def wait(self, timeout_s: float | None = None) -> str:
        """Its status once it is over. Raises DeadlinePassed after ``timeout_s`` seconds; None waits on."""
        return self._heard(self._client._batches.wait(self.id, timeout_s))

    def results(self, timeout_s: float | None = None) -> Generator[BatchItem, None, None]:
        """Yield what became of each request, in their order, once the batch is over.

        Raises DeadlinePassed if it is not over after ``timeout_s`` seconds (None waits on).
        """
        answer = self._client._run(self._client._batches.results(self.id, timeout_s))
        for line in self._client._lines(answer):
            if line:
                yield read_item(line)

    def cancel(self) -> str:
        """End it: what is not over is cancelled. Its status after that."""
        return self._heard(self._client._batches.cancel(self.id))

    def _heard(self, flow: Flow[Document]) -> str:
        self.document = self._client._run(flow)
        return str(self.document["status"])


class Client:
    """Calls models through a gateway. Keeps its connections: make one and share it between threads.

    ``url`` is the gateway's. By default it is ``TIDEGATE_GATEWAY_URL``, else the stack that the command line
    uses (``tidegate context``), with its credential. ``api_key`` is by default ``TIDEGATE_API_KEY``.
    ``timeout_s`` limits each call with all its retries. ``retries`` is how often a call is sent again when
    the connection fails, or when a 429 or 503 says by ``Retry-After`` that there is room before the
    deadline; 0 turns this off, also for models that must not run twice. Errors are those of
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
        found = address.find(url, api_key)
        self.url = found.url
        self._core = Core(timeout_s, Caller(retries))
        self._jobs = JobFlows(self._core)
        self._batches = BatchFlows(self._core)
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

        Arrays are sent as they are; a dtype other than the model's is cast where no value can change, and
        float64 is rounded to the model's floats, as lists are. Else it is a TypeError that says what the
        model expects. BYTES inputs are object arrays of ``bytes``
        or ``str``, BF16 inputs float32 (rounded). ``outputs`` names those wanted (default: all).

        Raises DeadlinePassed after ``timeout_s`` seconds, Overloaded with ``retry_after_s``, NotFound,
        BadRequest, ModelFailed with the model's own message, Unreachable when no gateway answers.
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
        """Have ``model`` run later: returns once the job is durable, with a handle to follow it.

        Inputs and errors are those of :meth:`infer`; ``timeout_s`` is for taking it in. The job expires
        ``ttl_s`` seconds after that. ``webhook`` is told of its end. Give an ``idempotency_key`` where the
        same call may be made twice, by another process or after a crash: both get the same job.
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
        """Run a model that answers many times, such as a language model; yields each answer as it comes.

        A model that is not decoupled has one answer. ``timeout_s`` is the longest wait for the first answer,
        and then between two. Closing the iterator, also by leaving the loop, cancels the request. BYTES
        inputs are text; FP16 and BF16 cannot be streamed. Errors are those of :meth:`infer`, and they may
        come after some answers.
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
        """Have ``model`` run on many inputs, each as :meth:`infer` takes them; returns a handle to follow it.

        The batch is durable: it goes on without this process. The requests are held in memory and sent as
        JSON; ``tidegate batch`` sends a file of any size. Each request expires ``ttl_s`` seconds after it was
        queued. See ``docs/jobs.md``.
        """
        flow = self._batches.submit(
            model, requests, version=version, priority=priority, ttl_s=ttl_s, timeout_s=timeout_s
        )
        return BatchHandle(self, self._run(flow))

    def batch(self, id: str) -> BatchHandle:
        """A handle to a batch by its id. Raises NotFound."""
        return BatchHandle(self, self._run(self._batches.status(id)))

    def job(self, id: str) -> JobHandle:
        """A handle to a job by its id. Raises NotFound."""
        return JobHandle(self, self._run(self._jobs.status(id)))

    def metadata(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> Metadata:
        """Name, versions, platform, inputs and outputs of a model. Raises NotFound."""
        return self._run(self._core.metadata(model, version=version, timeout_s=timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[Metadata]:
        """Every model that can be called: ``name``, ``version``, ``state``."""
        return self._run(self._core.models(timeout_s=timeout_s))

    def is_ready(self, model: str, *, version: Version = None, timeout_s: float | None = None) -> bool:
        """Whether the model takes requests, at once or by waking up; False for an unknown name."""
        return self._run(self._core.is_ready(model, version=version, timeout_s=timeout_s))

    def wait_ready(self, model: str, timeout_s: float = 120.0, *, version: Version = None) -> None:
        """Return once the model is ready. Raises DeadlinePassed after ``timeout_s`` seconds."""
        self._run(self._core.wait_ready(model, version=version, timeout_s=timeout_s))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        try:
            step = next(flow)
            while True:
                try:
                    result = self._do(step)
                except TidegateError as error:
                    problem = error
                else:
                    step = flow.send(result)
                    continue
                step = flow.throw(problem)
        except StopIteration as done:
            value: T = done.value
            return value

    def _lines(self, answer: Answer) -> Generator[str, None, None]:
        """The lines of a response that was left to be read, which is closed afterwards."""
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
