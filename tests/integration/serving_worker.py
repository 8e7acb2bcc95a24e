"""The serving part of a replica, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.api.requests import RequestConsumer
from services.worker.application.batch_scheduler import BatchScheduler
from services.worker.application.serving import ReplicaServing


@dataclass
class ServingWorker:
    """A replica without Triton, from the builder that replicas use."""

    serving: ReplicaServing

    @property
    def publisher(self) -> ReplyPublisher:
        return self.serving.publisher

    @property
    def requests(self) -> RequestConsumer:
        assert isinstance(self.serving.requests, RequestConsumer)
        return self.serving.requests

    @property
    def scheduler(self) -> BatchScheduler:
        assert isinstance(self.serving.scheduler, BatchScheduler)
        return self.serving.scheduler

    async def die(self) -> None:
        """Die as by SIGKILL: the connections break, nothing is settled."""
        await self.requests.connection.stop()
        await self.stop()

    async def stop(self) -> None:
        """Stop in the order of ``ReplicaLifecycle.stop``."""
        await self.serving.stop()
        await self.publisher.connection.stop()
