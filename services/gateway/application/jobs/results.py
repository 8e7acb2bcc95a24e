"""Read the results of jobs, and encode them like the answers of inference calls."""

from __future__ import annotations

from collections.abc import Callable

from services.gateway.domain import job_results, oip
from services.gateway.domain.classification import Labels
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.errors import ModelFailed
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.store import JobStore


class JobResults:
    """Read and encode jobs' results. ``labels`` returns the names of a Deployment's classes."""

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
        """Encode a reply frame. Return its JSON, and the binary tensors after it. Raises TidegateError.

        ``binary``: encode tensors as binary data or as JSON; None: as requested when the job was submitted.
        """
        try:
            reply = envelope.read_reply(frame)
            outputs, parameters = envelope.read_result_key(reply.key)
        except envelope.Undecodable as error:
            raise ModelFailed(
                f"the result of job {job.id.hex()} cannot be read: {error}; submit the job again"
            ) from None
        data = await self._claims.redeem(reply.data) if reply.claimed else reply.data
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
