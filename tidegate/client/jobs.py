"""The flows of calls about one durable job. ``JobHandle`` and ``AsyncJobHandle`` run them.

Each flow is a generator, see :mod:`tidegate.client.flow`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson

from tidegate.client.calls import Call
from tidegate.client.codec import HEAD_LENGTH, encode_request
from tidegate.client.core import Core, Metadata, Version, arrange
from tidegate.client.errors import BadAnswer
from tidegate.client.flow import Answer, Flow
from tidegate.client.result import InferResult, read_result
from tidegate.kernel.errors import DeadlinePassed

PATH = "/v1/jobs"
# Maximum seconds that one request waits at the gateway for a job's end.
WAIT_S = 20.0
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class JobOptions:
    """A job's options. None means the gateway's default. ``priority`` is high, normal or low.

    The job expires after ``ttl_s`` seconds."""

    priority: str | None = None
    ttl_s: float | None = None
    webhook: str | None = None
    metadata: Mapping[str, Any] | None = None
    idempotency_key: str | None = None

    def fields(self) -> Document:
        """Return the options as fields of the request's body."""
        given = {
            "priority": self.priority,
            "ttl_s": self.ttl_s,
            "webhook": self.webhook,
            "metadata": None if self.metadata is None else dict(self.metadata),
        }
        return {name: value for name, value in given.items() if value is not None}


class Handle:
    """The base of the handles of jobs and batches."""

    def __init__(self, document: Document) -> None:
        self.document = document

    @property
    def id(self) -> str:
        """Return the id of the job or batch."""
        return str(self.document["id"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id}; {self.document.get('status')})"

    def _heard(self, flow: Flow[Document]) -> Flow[str]:
        self.document = yield from flow
        return str(self.document["status"])


@dataclass(frozen=True, slots=True)
class JobFlows:
    """The flows of all job calls."""

    core: Core

    def submit(
        self,
        model: str,
        inputs: Any,
        options: JobOptions,
        *,
        version: Version,
        outputs: Sequence[str] | None,
        timeout_s: float | None,
        request_id: str | None,
        parameters: Mapping[str, Any] | None,
    ) -> Flow[Document]:
        """Submit a job. When it is durable, return its document. An idempotency key makes retries safe."""
        extra = {"model": model, **options.fields()} | ({} if version is None else {"version": str(version)})
        headers = {"Idempotency-Key": options.idempotency_key or os.urandom(16).hex()}

        def send(metadata: Metadata, left_s: float) -> Flow[Document]:
            body, head = encode_request(
                arrange(model, inputs, metadata),
                outputs=outputs,
                request_id=request_id,
                parameters=parameters,
                extra=extra,
            )
            told = headers | {HEAD_LENGTH: str(head), "Content-Type": "application/octet-stream"}
            answer = yield from self.core.caller.call(
                "POST", PATH, timeout_s=left_s, headers=told, content=body
            )
            return document_of(answer)

        return (yield from self.core.fitting(model, version, inputs, timeout_s, send))

    def status(self, id: str, *, wait_s: float = 0.0) -> Flow[Document]:
        """Return a job's document when the job has ended, or after ``wait_s`` seconds at the latest."""
        answer = yield from self._get(_path(id), wait_s)
        return document_of(answer)

    def wait(self, id: str, timeout_s: float | None) -> Flow[Document]:
        """Wait until a job has ended, and return its document.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        clock = self.core.caller.clock
        deadline = None if timeout_s is None else clock() + timeout_s
        while True:
            left = WAIT_S if deadline is None else deadline - clock()
            document = yield from self.status(id, wait_s=max(0.0, min(left, WAIT_S)))
            if document.get("finished_at"):
                return document
            if left <= 0:
                raise DeadlinePassed(
                    f"Job {id} is {document.get('status')} after {timeout_s:g} s.", reason="not_over"
                )

    def result(self, id: str, timeout_s: float | None) -> Flow[InferResult]:
        """Wait for a job's result and return it. Raise the job's error, or DeadlinePassed."""
        yield from self.wait(id, timeout_s)
        return read_result((yield from self._get(f"{_path(id)}/result", 0.0)))

    def cancel(self, id: str) -> Flow[Document]:
        """Cancel a job and return its document. If the job ended first, its status is not ``cancelled``."""
        return document_of((yield from self.core.call("DELETE", _path(id), None)))

    def retry(self, id: str) -> Flow[Document]:
        """Submit a failed job's request again and return the new job's document."""
        return document_of((yield from self.core.call("POST", f"{_path(id)}/retry", None)))

    def _get(self, path: str, wait_s: float) -> Flow[Answer]:
        # The header has whole seconds. If the wait is shorter than a second, send 1, because 0 would not
        # wait.
        headers = {"Prefer": f"wait={max(1, round(wait_s))}"} if wait_s > 0 else {}
        limit = self.core.timeout_s + wait_s
        return (yield from self.core.caller.call("GET", path, timeout_s=limit, headers=headers))


def _path(id: str) -> str:
    return f"{PATH}/{quote(id, safe='')}"


def document_of(answer: Answer) -> Document:
    """Return the JSON object of an answer. Raise BadAnswer if the answer is not a JSON object."""
    try:
        found = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise BadAnswer("The answer is not a JSON object; is this the URL of a Tidegate gateway?")
    return found


class JobCalls(Handle):
    """A job's handle with the calls that both clients have."""

    def __init__(self, document: Document, jobs: JobFlows) -> None:
        super().__init__(document)
        self._jobs = jobs

    @Call
    def status(self) -> Flow[str]:
        """Fetch the status: queued, running, succeeded, failed, cancelled or expired."""
        return self._heard(self._jobs.status(self.id))

    @Call
    def wait(self, timeout_s: float | None = None) -> Flow[str]:
        """Wait until the job has ended, and return its status.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        return self._heard(self._jobs.wait(self.id, timeout_s))

    @Call
    def result(self, timeout_s: float | None = None) -> Flow[InferResult]:
        """Wait for the result and return it. A later call returns the same result.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit). If the job has no result, raise its
        error: ModelFailed if it failed, Conflict if it was cancelled, DeadlinePassed if it expired.
        """
        return self._jobs.result(self.id, timeout_s)

    @Call
    def cancel(self) -> Flow[str]:
        """Cancel the job and return its status. The status is not ``cancelled`` if the job ended first."""
        return self._heard(self._jobs.cancel(self.id))
