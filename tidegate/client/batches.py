"""The flows (:mod:`tidegate.client.flow`) of batch calls, for the blocking and asyncio clients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from tidegate.client.calls import Call
from tidegate.client.codec import Tensor, from_json_output, to_json_input
from tidegate.client.core import Core, Metadata, Version, arrange
from tidegate.client.errors import BadAnswer, from_document
from tidegate.client.flow import Answer, Flow, Sleep
from tidegate.client.jobs import Document, Handle, document_of
from tidegate.client.result import InferResult
from tidegate.kernel.errors import BadRequest, DeadlinePassed, TidegateError

PATH = "/v1/batches"
POLL_S = 0.5


class BatchCalls(Handle):
    """The calls of a batch's handle. The blocking client and the asyncio client share them."""

    def __init__(self, document: Document, batches: BatchFlows) -> None:
        super().__init__(document)
        self._batches = batches

    @property
    def lines(self) -> int:
        """Return the number of requests in the batch."""
        return int(self.document["lines"])

    @property
    def done(self) -> int:
        """Return how many requests had ended when ``document`` was fetched."""
        return int(self.document["done"])

    @Call
    def status(self) -> Flow[str]:
        """Fetch the status: ``running``, ``cancelling``, ``completed``, ``cancelled`` or ``failed``."""
        return self._heard(self._batches.status(self.id))

    @Call
    def wait(self, timeout_s: float | None = None) -> Flow[str]:
        """Wait until the batch has ended, and return its status.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        return self._heard(self._batches.wait(self.id, timeout_s))

    @Call
    def cancel(self) -> Flow[str]:
        """Cancel the requests that have not ended. Return the batch's status."""
        return self._heard(self._batches.cancel(self.id))


@dataclass(frozen=True, slots=True)
class BatchItem:
    """The outcome of one request of a batch: ``result`` or ``error``.

    ``line``: the number of the request in the batch, from 0.
    """

    line: int
    status: str
    result: InferResult | None
    error: TidegateError | None

    def get(self) -> InferResult:
        """Return the result, or raise the request's error."""
        if self.result is not None:
            return self.result
        raise self.error or BadAnswer(f"Line {self.line} of the batch has neither a result nor an error.")


@dataclass(frozen=True, slots=True)
class BatchFlows:
    """The flows of all batch calls."""

    core: Core

    def submit(
        self,
        model: str,
        requests: Iterable[Any],
        *,
        version: Version,
        priority: str | None,
        ttl_s: float | None,
        timeout_s: float | None,
    ) -> Flow[Document]:
        """Submit a batch. Return its document when the batch is durable.

        After a broken connection, the HTTP request is not sent again, because that could create a second
        batch.
        """
        wanted = list(requests)
        if not wanted:
            raise BadRequest("A batch needs at least one request.")
        given = {"model": model, "version": version, "priority": priority, "ttl_s": ttl_s}
        query = urlencode({name: str(value) for name, value in given.items() if value is not None})

        def send(metadata: Metadata, left_s: float) -> Flow[Document]:
            body = b"".join(_line(arrange(model, inputs, metadata)) for inputs in wanted)
            headers = {"Content-Type": "application/jsonl"}
            answer = yield from self.core.caller.call(
                "POST",
                f"{PATH}?{query}",
                timeout_s=left_s,
                headers=headers,
                content=body,
                repeatable=False,
            )
            return document_of(answer)

        return (yield from self.core.fitting(model, version, wanted[0], timeout_s, send))

    def status(self, id: str) -> Flow[Document]:
        """Return a batch's document."""
        return document_of((yield from self.core.call("GET", _path(id), None)))

    def cancel(self, id: str) -> Flow[Document]:
        """Cancel a batch and return its document."""
        return document_of((yield from self.core.call("DELETE", _path(id), None)))

    def wait(self, id: str, timeout_s: float | None) -> Flow[Document]:
        """Wait until a batch has ended, and return its document.

        Raise DeadlinePassed after ``timeout_s`` seconds (None: no limit).
        """
        clock = self.core.caller.clock
        deadline = None if timeout_s is None else clock() + timeout_s
        while True:
            document = yield from self.status(id)
            if document.get("finished_at"):
                return document
            if deadline is not None and clock() >= deadline:
                raise DeadlinePassed(
                    f"Batch {id} has not ended within {timeout_s:g} s. {document.get('done')} of its "
                    f"{document.get('lines')} lines are done.",
                    reason="not_over",
                )
            yield Sleep(POLL_S)

    def results(self, id: str, timeout_s: float | None) -> Flow[Answer]:
        """Wait until a batch has ended. Return the HTTP response with the results.

        The response's body is not read yet. Raise DeadlinePassed after ``timeout_s`` seconds (None: no
        limit).
        """
        yield from self.wait(id, timeout_s)
        return (
            yield from self.core.caller.call(
                "GET", f"{_path(id)}/results", timeout_s=self.core.timeout_s, stream=True
            )
        )


def read_item(line: str) -> BatchItem:
    """Return the outcome that one line of the results contains. Raise BadAnswer for a malformed line."""
    try:
        found = orjson.loads(line)
        response, error = found.get("response"), found.get("error")
        return BatchItem(
            int(found["line"]),
            str(found["status"]),
            None if response is None else _result(response, str(found.get("job") or "")),
            None if error is None else from_document(error),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BadAnswer("A line of the batch's results is malformed.") from None


def _result(head: Document, job: str) -> InferResult:
    return InferResult(
        {output["name"]: from_json_output(output) for output in head.get("outputs", [])},
        model_name=str(head.get("model_name", "")),
        model_version=str(head.get("model_version", "")),
        request_id=str(head.get("id", "")),
        timing={},
        parameters=head.get("parameters") or {},
        feedback_id=job,
    )


def _line(tensors: list[Tensor]) -> bytes:
    return orjson.dumps({"inputs": [to_json_input(tensor) for tensor in tensors]}) + b"\n"


def _path(id: str) -> str:
    return f"{PATH}/{quote(id, safe='')}"
