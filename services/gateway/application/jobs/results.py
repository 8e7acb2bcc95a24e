"""Read the results of jobs, and encode them like the answers of inference calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.gateway.domain import job_results, llm_jobs, oip
from services.gateway.domain.classification import Labels
from services.gateway.domain.llm_jobs import LlmJobAnswer
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply, Tensor
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.store import JobStore


class JobResults:
    """Reads and encodes the results of jobs. ``labels`` returns the class names of a Deployment."""

    def __init__(
        self, store: JobStore, claims: Claims, labels: Callable[[str], Labels] = lambda _: {}
    ) -> None:
        self._store = store
        self._claims = claims
        self._labels = labels

    async def frame(self, job: Job) -> bytes:
        """Return the reply frame of a job that succeeded. Raises ModelFailed if the frame was deleted."""
        frame = await self._store.result(job.id)
        if frame is None:
            raise ModelFailed(
                f"the result of job {job.id.hex()} was deleted: send the request again",
                reason="result_gone",
            )
        return frame

    async def encoded(self, job: Job, frame: bytes, binary: bool | None = None) -> tuple[bytes, list[Buffer]]:
        """Encode a reply frame. Return the JSON, and the binary tensors that follow it. Raises TidegateError.

        ``binary``: True for binary tensors, False for JSON, None for the form that the job requested.
        For a language model, the JSON is the engine's answer.
        """
        if llm_jobs.is_llm(job.ask):
            return (await self.llm_answer(job, frame)).body, []
        reply, outputs, parameters, data = await self._read(job, frame)
        return oip.encode(
            job.endpoint,
            str(job.version),
            job_results.read_answer_form(job.ask, binary),
            reply.rows,
            outputs,
            parameters,
            data,
            self._labels(job.deployment),
        )

    async def llm_answer(self, job: Job, frame: bytes) -> LlmJobAnswer:
        """Return the answer of a language model from a reply frame. Raises TidegateError."""
        _, outputs, _, data = await self._read(job, frame)
        try:
            return llm_jobs.read_answer(outputs, data, job.ask)
        except ValueError as error:
            raise _unreadable(job, error) from None

    async def tensors(self, job: Job, frame: bytes) -> tuple[tuple[Tensor, ...], list[Buffer], int]:
        """Return the outputs of a reply frame, their raw data, and the row count. Raises TidegateError."""
        reply, outputs, _, data = await self._read(job, frame)
        return outputs, data, reply.rows

    async def _read(
        self, job: Job, frame: bytes
    ) -> tuple[Reply, tuple[Tensor, ...], dict[str, Any], list[Buffer]]:
        try:
            reply = envelope.read_reply(frame)
            outputs, parameters = envelope.read_result_key(reply.key)
        except envelope.Undecodable as error:
            raise _unreadable(job, error) from None
        data = await self._claims.redeem(reply.data) if reply.claimed else reply.data
        return reply, outputs, parameters, data


def _unreadable(job: Job, error: Exception) -> ModelFailed:
    return ModelFailed(f"the result of job {job.id.hex()} cannot be read: {error}; submit the job again")
