"""The two forms of batches: Tidegate's lines with tensors, and OpenAI's requests to language models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from services.gateway.application.jobs.results import JobResults
from services.gateway.domain import batch_lines, oip
from services.gateway.domain.batches import Batch
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.job_options import JobOptions
from services.gateway.domain.openai import lines as openai_lines
from services.gateway.domain.openai.facts import OpenAiFacts
from tidegate.kernel.errors import DeadlinePassed, TidegateError
from tidegate.kernel.protocol.jobs import Job

# The shortest ttl of a line's job, in seconds. A job with no time left would be refused.
LEAST_TTL_S = 1.0


class LineRequest(NamedTuple):
    """The request of a line: ``decode`` for a request with tensors, ``body`` for a language model.

    ``decode``: a function that checks the tensors against a signature. ``facts``: the parameters that the
    endpoint's traffic rules may read.
    """

    model: str
    version: str
    options: JobOptions
    facts: dict[str, Any]
    decode: Callable[[Contract], Decoded] | None = None
    body: dict[str, Any] | None = None

    @property
    def endpoint(self) -> str:
        """Return the name of the endpoint, without the adapter of a language model."""
        return self.model.partition(":")[0]


class ResultLine(NamedTuple):
    """The result of one request line. ``line``: the line to write to the results file."""

    outcome: str
    line: bytes


class LineForm(Protocol):
    """Reads the lines of a batch, and writes their results."""

    def id_of(self, raw: bytes) -> str | None:
        """Return the caller's id of a line, or None."""

    @property
    def path(self) -> str:
        """Return the URL path of the requests to language models; empty for requests with tensors."""

    def read(self, raw: bytes) -> LineRequest:
        """Return the request of a line. Raises TidegateError."""

    def overdue(self) -> TidegateError | None:
        """Return the error for lines that have not started; None while the batch still has time."""

    async def answered(self, number: int, id_: str | None, job: Job, frame: bytes) -> ResultLine:
        """Return the result of a line whose job has an answer. Raises TidegateError."""

    def failed(
        self, number: int, id_: str | None, job: str | None, outcome: str, error: TidegateError
    ) -> ResultLine:
        """Return the result of a line that has no answer."""


class TensorLines:
    """Read and write lines in Tidegate's own form: each line is an inference request with tensors."""

    def __init__(self, batch: Batch, results: JobResults) -> None:
        self._batch = batch
        self._results = results

    path = ""

    def id_of(self, raw: bytes) -> str | None:
        """Return the ``id`` of a line, or None."""
        return batch_lines.line_id(raw)

    def read(self, raw: bytes) -> LineRequest:
        """Return the request of a line. Raises BadRequest."""
        line = batch_lines.read_line(raw, self._batch)

        def decode(contract: Contract) -> Decoded:
            return oip.decode_head(line.head, memoryview(b""), contract)

        facts = line.head.get("parameters")
        return LineRequest(
            line.model, line.version, line.options, facts if isinstance(facts, dict) else {}, decode
        )

    def overdue(self) -> TidegateError | None:
        """Return None, because each line has its own time limit."""
        return None

    async def answered(self, number: int, id_: str | None, job: Job, frame: bytes) -> ResultLine:
        """Return a result line with the tensors of the answer."""
        response, _ = await self._results.encoded(job, frame, binary=False)
        return ResultLine("succeeded", batch_lines.result_line(number, id_, job.id.hex(), response))

    def failed(
        self, number: int, id_: str | None, job: str | None, outcome: str, error: TidegateError
    ) -> ResultLine:
        """Return a result line with the error."""
        return ResultLine(outcome, batch_lines.failed_line(number, id_, job, outcome, error))


class OpenAiLines:
    """Read and write lines in OpenAI's form: each line is a request to a language model."""

    def __init__(self, batch: Batch, facts: OpenAiFacts, results: JobResults) -> None:
        self._batch = batch
        self._facts = facts
        self._results = results
        self.path = facts.endpoint

    def id_of(self, raw: bytes) -> str | None:
        """Return the ``custom_id`` of a line, or None."""
        return openai_lines.custom_id(raw)

    def read(self, raw: bytes) -> LineRequest:
        """Return the request of a line. Raises LineError."""
        line = openai_lines.read_line(raw, self._facts.endpoint)
        left_s = max(self._facts.expires_ms / 1e3 - time.time(), LEAST_TTL_S)
        options = JobOptions(self._batch.level, left_s)
        return LineRequest(line.model, "", options, line.body, body=line.body)

    def overdue(self) -> TidegateError | None:
        """Return the error for lines that have not started, if the completion window is over; else None."""
        if time.time() * 1e3 < self._facts.expires_ms:
            return None
        return DeadlinePassed(
            "the request could not run before the end of the batch's completion window", reason="expired"
        )

    async def answered(self, number: int, id_: str | None, job: Job, frame: bytes) -> ResultLine:
        """Return a result line with the engine's answer or refusal."""
        answer = await self._results.llm_answer(job, frame)
        outcome = "succeeded" if job.state == "succeeded" else "failed"
        return ResultLine(outcome, openai_lines.result_line(id_, job.id.hex(), answer))

    def failed(
        self, number: int, id_: str | None, job: str | None, outcome: str, error: TidegateError
    ) -> ResultLine:
        """Return a result line with the error."""
        name = job or f"{self._batch.id.hex()}_{number}"
        return ResultLine(outcome, openai_lines.failed_line(name, id_, error))


def line_form(batch: Batch, results: JobResults) -> LineForm:
    """Return the form of a batch."""
    if batch.openai is None:
        return TensorLines(batch, results)
    return OpenAiLines(batch, batch.openai, results)
