"""Start and stop the parts of a replica that consume, run, answer and sample requests and jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.worker.adapters.model import Model
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.application.job_leases import JobLeases
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.sampler import Sampler
from services.worker.domain.job_backlog import QueuedJob
from services.worker.domain.statistics import WorkStats
from tidegate.kernel.broker.connection import Connection


class Consumer(Protocol):
    """A consumer of a Deployment's messages. Each consumer has its own connection to RabbitMQ."""

    connection: Connection

    @property
    def unsettled(self) -> int:
        """Return how many messages are not settled yet."""

    async def open(self) -> None:
        """Consume messages from now on."""

    async def close(self) -> None:
        """Stop consuming. Requests and jobs that have started still run and are settled."""

    async def stop(self) -> None:
        """Disconnect; unsettled messages go back to their queues."""


class Requests(Consumer, Protocol):
    """The consumer of requests."""

    def start(self) -> None:
        """Connect; no request is consumed before :meth:`open`."""

    @property
    def holds(self) -> int:
        """Return how many requests the gateways should publish to keep this worker busy; 0 if unknown.

        With fewer requests, the worker would sometimes be idle.
        """

    def requeue_waiting(self) -> None:
        """Requeue the requests that have not started, if other replicas consume the queue."""


class Scheduler(Protocol):
    """Interface of a scheduler, which runs a model's requests and jobs.

    One class implements it for language models, and another class for all other models.
    """

    stats: WorkStats
    suspect_died: bool

    @property
    def in_hand(self) -> int:
        """Return how many requests and jobs wait here or are in a call."""

    @property
    def copies(self) -> int:
        """Return how many of the requests ``in_hand`` are copies for shadow traffic."""

    @property
    def max_calls(self) -> int:
        """Return how many calls may be open at the same time."""

    @property
    def max_batch(self) -> int:
        """Return how many rows fit into one call; 0 if the model has no batch axis."""

    @property
    def effective_concurrency(self) -> float:
        """Return how many requests this replica completes in the time of one call, under full load."""

    @property
    def kept_sequences(self) -> int:
        """Return how many sequences of a stateful model this worker keeps."""

    @property
    def sequence_slots(self) -> int:
        """Return how many sequences this worker can keep; 0: its model is not stateful."""

    def start(self) -> None:
        """Start to run requests."""

    async def stop(self) -> None:
        """Stop immediately. The requests here stay unsettled, so the broker delivers them again."""

    def use(self, model: Model | None) -> None:
        """Use ``model`` for all later calls. If it is None, start no calls."""

    def lose_model(self) -> None:
        """Start no more calls, because the model server has ended."""

    def caller_timeouts_s(self) -> list[float]:
        """Return one number of seconds for each open call: the longest timeout of its callers."""


class JobMessages(Consumer, Protocol):
    """The consumer of jobs."""

    def start(self, scheduler: Scheduler) -> None:
        """Connect; no job is consumed before :meth:`open`."""


@dataclass(frozen=True, slots=True)
class JobServing:
    """The parts that run jobs."""

    scheduler: JobScheduler
    messages: JobMessages
    leases: JobLeases


@dataclass(frozen=True, slots=True)
class ReplicaServing:
    """The parts of a worker that run requests, and the parts that run jobs.

    ``jobs`` is None if this worker runs no jobs. ``sampler`` is None if this worker samples no rows.
    """

    publisher: ReplyPublisher
    requests: Requests
    scheduler: Scheduler
    jobs: JobServing | None = None
    sampler: Sampler | None = None

    @property
    def unsettled(self) -> int:
        """Return how many messages of requests and jobs are not settled yet."""
        return self.requests.unsettled + self.unsettled_jobs

    @property
    def busy(self) -> bool:
        """Return True while this worker has requests, jobs or sequences that it can finish.

        A job that waits for an upstream or a busy engine does not count. The jobs that are queued behind it
        do not count either. The upstream may be away for days, and a drain should not wait for it.
        """
        scheduler, stuck = self.scheduler, self._stuck_jobs()
        in_hand = scheduler.in_hand - len(stuck)
        unsettled_jobs = self.unsettled_jobs - sum(job.leased_at is None for job in stuck)
        return in_hand > 0 or unsettled_jobs > 0 or bool(self.requests.unsettled or scheduler.kept_sequences)

    def _stuck_jobs(self) -> list[QueuedJob]:
        jobs = list(self.jobs.scheduler.by_id.values()) if self.jobs else []
        if not any(job.waits for job in jobs):
            return []
        return [job for job in jobs if job.waits or not job.started]

    @property
    def unsettled_jobs(self) -> int:
        """Return how many messages of jobs are not settled yet."""
        return self.jobs.messages.unsettled if self.jobs else 0

    @property
    def problem(self) -> str | None:
        """Return a problem of the connections for requests and replies; None if both work."""
        return self.publisher.connection.problem or self.requests.connection.problem

    def start(self) -> None:
        """Connect, and start the schedulers; nothing is consumed before :meth:`open`."""
        self.scheduler.start()
        self.requests.start()
        if self.sampler is not None:
            self.sampler.start()
        if self.jobs is not None:
            self.jobs.leases.start()
            self.jobs.messages.start(self.scheduler)

    async def wait_up(self, timeout_s: float) -> None:
        """Wait until the connections for requests and replies are up.

        ``timeout_s`` is the longest wait for each of these connections, in seconds. The connection for jobs
        may come up later.
        """
        for connection in (self.publisher.connection, self.requests.connection):
            await connection.wait_up(timeout_s)

    async def open(self, draining: Callable[[], bool]) -> None:
        """Start to consume requests and jobs, unless ``draining`` returns True."""
        if draining():
            return
        await self.requests.open()
        if self.jobs is not None and not draining():
            await self.jobs.messages.open()

    async def close(self) -> None:
        """Stop consuming.

        Requests that were received, and jobs that have started, still run. Their messages are settled after
        that. Jobs that have not started are requeued.
        """
        await self.requests.close()
        if self.jobs is not None:
            await self.jobs.messages.close()

    async def stop(self) -> None:
        """Stop immediately; unsettled messages go back to their queues."""
        await self.scheduler.stop()
        if self.jobs is not None:
            await self.jobs.leases.stop()
            await self.jobs.messages.stop()
        await self.requests.stop()
        if self.sampler is not None:
            await self.sampler.stop()
