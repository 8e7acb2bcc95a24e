"""Interface through which the scheduler of jobs settles the messages of jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.worker.domain.job_backlog import QueuedJob


class JobDeliveries(Protocol):
    """Interface that settles the messages of jobs."""

    def ack(self, group: Sequence[QueuedJob]) -> None:
        """Ack the messages of jobs that are done."""

    def nack(self, group: Sequence[QueuedJob]) -> None:
        """Requeue the messages of jobs."""

    def can_ack(self, job: QueuedJob) -> bool:
        """Return True if the channel of the job's message is still open."""

    async def dead_letter(self, job: QueuedJob) -> None:
        """Send the router a job that has no more attempts. The router keeps it as a dead letter.

        Return after the publisher confirm.
        """
