"""Create a replica, with the parts that serve its requests and jobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.triton_process import TritonProcess
from services.worker.api.jobs import JobConsumer
from services.worker.api.llm_requests import LlmRequestConsumer
from services.worker.api.requests import RequestConsumer
from services.worker.application.batch_scheduler import BatchScheduler, OnLost
from services.worker.application.job_leases import JobLeases
from services.worker.application.job_records import JobRecords
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.lifecycle import ReplicaLifecycle
from services.worker.application.llm_scheduler import LlmScheduler
from services.worker.application.sampler import Counter, Sampler
from services.worker.application.serving import JobServing, ReplicaServing
from services.worker.domain.concurrency import CallLimits
from services.worker.domain.llm_bands import LlmRoom
from services.worker.settings import WorkerSettings
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.topology import Queue, deployment_of, requests_queue, sequences_queue
from tidegate.kernel.protocol.models import Assignment, Deployment, LlmSpec, SequenceSpec
from tidegate.kernel.store import JobStore, Store
from tidegate.kernel.store.profiles import ProfileStore


def build_serving(
    amqp_url: str,
    queue: Queue,
    replica: str,
    publisher: ReplyPublisher,
    claims: Claims,
    limits: CallLimits,
    *,
    fetch_bytes: int,
    on_lost: OnLost,
    jobs: JobServing | None = None,
    sampler: Sampler | None = None,
    sequences: SequenceSpec | None = None,
) -> ReplicaServing:
    """Return the parts that run the requests of ``queue``. If ``jobs`` is given, they also run jobs.

    ``fetch_bytes``: the most bytes of memory for tensors that were fetched from the blob store. The tensors
    of a request are fetched before the request enters the backlog. ``sequences``: the sequence settings of a
    stateful model; None: the model is not stateful.
    """
    if jobs is not None:
        jobs.scheduler.sampler = sampler
    own = sequences_queue(deployment_of(queue.name), replica) if sequences is not None else None
    requests = RequestConsumer(
        amqp_url, queue, replica, publisher, claims=claims, fetch_bytes=fetch_bytes, sequences=own
    )
    scheduler = BatchScheduler(
        publisher,
        requests.settle,
        requests.reply,
        limits,
        on_lost=on_lost,
        jobs=jobs.scheduler if jobs else None,
        sampler=sampler,
        sequences=sequences,
    )
    requests.deliver_to(scheduler)
    return ReplicaServing(publisher, requests, scheduler, jobs, sampler)


def build_llm_serving(
    amqp_url: str,
    deployment: str,
    replica: str,
    publisher: ReplyPublisher,
    claims: Claims,
    room: LlmRoom,
    *,
    fetch_bytes: int,
    on_lost: OnLost,
    jobs: JobServing | None = None,
    sampler: Sampler | None = None,
) -> ReplicaServing:
    """Return the parts that run requests to a language model. If ``jobs`` is given, they also run jobs."""
    requests = LlmRequestConsumer(
        amqp_url, deployment, replica, publisher, claims=claims, fetch_bytes=fetch_bytes
    )
    scheduler = LlmScheduler(
        publisher,
        requests.settle,
        room,
        replica,
        on_lost=on_lost,
        jobs=jobs.scheduler if jobs else None,
        sampler=sampler,
    )
    requests.deliver_to(scheduler)
    return ReplicaServing(publisher, requests, scheduler, jobs, sampler)


def llm_room(deployment: Deployment) -> LlmRoom:
    """Return the engine slots and the KV cache tokens that requests to a language model may use."""
    spec = deployment.llm or LlmSpec()
    return LlmRoom(min(spec.slots, deployment.max_concurrency or spec.slots), spec.kv_tokens)


def build_job_serving(
    amqp_url: str,
    deployment: str,
    replica: str,
    publisher: ReplyPublisher,
    claims: Claims,
    limits: CallLimits,
    store: JobStore,
    *,
    keep_s: float,
    ack_timeout_s: float,
    upstream_wait_s: float = 0.0,
) -> JobServing:
    """Return the parts that run a Deployment's jobs.

    ``keep_s``: the seconds for which results are stored. ``upstream_wait_s``: the maximum seconds that a job
    waits for an upstream that does not answer. ``ack_timeout_s``: the broker's limit for an unacked delivery,
    in seconds.
    """
    records = JobRecords(store, claims, replica, keep_s=keep_s)
    scheduler = JobScheduler(
        records, max_rows=limits.max_rows, slots=limits.streams, upstream_wait_s=upstream_wait_s
    )
    consumer = JobConsumer(amqp_url, deployment, publisher, scheduler)
    scheduler.settle_through(consumer)
    leases = JobLeases(store, scheduler, consumer, replica, ack_timeout_s=ack_timeout_s)
    return JobServing(scheduler, consumer, leases)


def build_sampler(redis_url: str, blobs: Blobs, deployment: Deployment, replica: str) -> Sampler | None:
    """Return the sampler of a replica; None if its Deployment samples no rows."""
    if not deployment.sampling:
        return None

    def counter() -> Counter:
        from services.worker.application.profile_counter import ProfileCounter  # imports numpy

        return ProfileCounter(replica, deployment.redact, deployment.keep_rows)

    store = ProfileStore.connect(redis_url)
    return Sampler(store, blobs, deployment.name, counter, deployment.sampling)


def build_replica(
    settings: WorkerSettings,
    assignment: Assignment,
    folder: Path,
    store: Store,
    job_store: JobStore,
    blobs: Blobs,
    http_port: int,
    triton: TritonProcess | None,
) -> ReplicaLifecycle:
    """Return the replica that runs an assignment.

    ``triton``: a Triton of the warm pool that is already running; None: the replica starts one.
    """
    deployment, replica = assignment.deployment.name, assignment.replica
    queue, claims = requests_queue(deployment), Claims(blobs, settings.claim_above_bytes)
    publisher = ReplyPublisher(settings.amqp_url, queue, claims)

    room = llm_room(assignment.deployment) if assignment.version.format == "llm" else None

    def build(limits: CallLimits, on_lost: OnLost, sequences: SequenceSpec | None) -> ReplicaServing:
        if room is not None:
            limits = replace(limits, streams=room.slots)
        jobs = build_job_serving(
            settings.amqp_url,
            deployment,
            replica,
            publisher,
            claims,
            limits,
            job_store,
            keep_s=settings.job_retention_s,
            ack_timeout_s=settings.ack_timeout_s,
            upstream_wait_s=settings.upstream_wait_s,
        )
        if room is not None:
            return build_llm_serving(
                settings.amqp_url,
                deployment,
                replica,
                publisher,
                claims,
                room,
                fetch_bytes=settings.max_fetched_bytes,
                on_lost=on_lost,
                jobs=jobs,
                sampler=build_sampler(settings.redis_url, blobs, assignment.deployment, replica),
            )
        return build_serving(
            settings.amqp_url,
            queue,
            replica,
            publisher,
            claims,
            limits,
            fetch_bytes=settings.max_fetched_bytes,
            on_lost=on_lost,
            jobs=jobs,
            sampler=build_sampler(settings.redis_url, blobs, assignment.deployment, replica),
            sequences=sequences,
        )

    token = read_token(folder)
    return ReplicaLifecycle(settings, assignment, folder, store, http_port, token, publisher, build, triton)


def read_token(folder: Path) -> str:
    """Return the replica's token from the launcher's file; empty if there is none."""
    try:
        return (folder / "token").read_text().strip()
    except FileNotFoundError:
        return ""
