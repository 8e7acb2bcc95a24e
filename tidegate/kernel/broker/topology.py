"""Every exchange, queue and routing key, as values: what it carries, who publishes, who consumes.

Queues are declared, idempotently, by whoever publishes or consumes. Their names carry a version:
RabbitMQ refuses another declaration of an existing name, so changed arguments need a new name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tidegate.kernel.protocol.jobs import Level


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange and how it is declared."""

    name: str
    kind: Literal["topic", "fanout", "direct"]


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue and how it is declared. All are durable: RabbitMQ 4.3 refuses transient shared ones.

    ``exchange``: one that leads to the queue by the queue's name, beside the default exchange.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    auto_delete: bool = False
    exchange: Exchange | None = None


# Hints that something happened. Nobody depends on them: every consumer re-lists every few seconds.
#   registry.changed      registry -> router, autoscaler    JSON {revision, kind, name, action}
#   demand.<deployment>   gateway  -> autoscaler            JSON {deployment}, at most one a second
EVENTS = Exchange("tidegate.events.v1", "topic")
REGISTRY_CHANGED = "registry.changed"
DEMAND_PREFIX = "demand."

# Ids of requests whose caller has gone: gateway -> every worker, best effort.
CANCELS = Exchange("tidegate.cancels.v1", "fanout")

# All that workers publish: replies, retries, exceptions. A worker may not publish to the default exchange,
# because it leads to every queue (see ``permissions``). The owners of the queues bind them to this exchange.
WORKERS = Exchange("tidegate.workers.v1", "direct")

# Assignments for workers that wait: autoscaler -> warm.v1.<pool>.
WARM = Exchange("tidegate.warm.v1", "direct")

# Request frames that no worker may take again (attempts exhausted) or that nobody could read:
# worker, gateway -> router, which answers their callers and keeps what it saw.
EXCEPTIONS = Queue("exceptions.v1", exchange=WORKERS)

# Who used what: gateway -> registry. JSON, persistent, acked once it is in the database.
USAGE = Queue("usage.v1")

# A quorum queue drops a message after so many deliveries: 20 by default since RabbitMQ 4.0. How often a job
# may be tried is for its record to say, so this is as good as never, and every version takes the number.
DELIVERIES = 1_000_000_000
JOBS_PREFIX = "jobs.v1."
REQUESTS_PREFIX = "requests.v1."
# Stands for a dot of a Deployment's name in a queue's name, where dots divide. No name has it, and the AMQP
# library takes it in a queue's name.
_DOT = ":"
REPLIES_PREFIX = "replies.v1."


def word_of(deployment: str) -> str:
    """Return a Deployment's name as one word of a queue's name: ``x.suspects`` is another than ``x``."""
    return deployment.replace(".", _DOT)


def deployment_of(queue: str) -> str:
    """Return the Deployment that a queue of requests, suspects or jobs is for; empty for any other queue."""
    for prefix in (REQUESTS_PREFIX, JOBS_PREFIX):
        if queue.startswith(prefix):
            return queue.removeprefix(prefix).partition(".")[0].replace(_DOT, ".")
    return ""


def requests_queue(deployment: str) -> Queue:
    """Request envelopes of interactive calls: gateway -> the deployment's workers. Transient messages."""
    return Queue(f"{REQUESTS_PREFIX}{word_of(deployment)}", exchange=WORKERS)


def suspects_queue(requests: Queue) -> Queue:
    """Requests, one an envelope, that may have killed a worker: worker -> the deployment's workers.

    The router declares and binds it: workers may not bind what others publish.
    One that is delivered runs at once, with nothing beside it in the model. So one that is redelivered was
    alone when its worker died.
    """
    return Queue(f"{requests.name}.suspects", exchange=WORKERS)


def jobs_queue(deployment: str, level: Level) -> Queue:
    """Request envelopes of one request each, of jobs: gateway, router -> the deployment's workers.

    Persistent, confirmed, mandatory. Created on first use; what a message loses, the job's record has.
    """
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERIES}
    return Queue(f"{JOBS_PREFIX}{word_of(deployment)}.{level}", arguments)


def warm_queue(pool: str) -> Queue:
    """Assignments for workers that wait without a model: autoscaler -> one of them. Short-lived."""
    return Queue(f"warm.v1.{pool}", exchange=WARM)


def replies_queue(incarnation: str) -> Queue:
    """Reply envelopes: worker, router -> one gateway process. Survives a reconnect, not the process."""
    return Queue(f"{REPLIES_PREFIX}{incarnation}", {"x-expires": 60_000}, exchange=WORKERS)


def events_queue(service: str, incarnation: str) -> Queue:
    """A service's own copy of the events it listens to; goes with its connection."""
    return Queue(f"events.v1.{service}.{incarnation}", exclusive=True, auto_delete=True)


def cancels_queue(replica: str, incarnation: str) -> Queue:
    """A worker's own copy of the cancels."""
    return Queue(f"cancels.v1.{replica}.{incarnation}", exclusive=True, auto_delete=True)


def demand_key(deployment: str) -> str:
    """Routing key by which a gateway says that a Deployment is wanted."""
    return f"{DEMAND_PREFIX}{deployment}"
