"""Name every exchange, queue and routing key. ``a -> b`` means that a publishes and b consumes.

The services that publish or consume declare the queues. RabbitMQ refuses to declare an existing queue with
other arguments. So the names contain a version: a queue with changed arguments gets a new name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from tidegate.kernel.protocol.jobs import Level
from tidegate.kernel.protocol.llm import Band


@dataclass(frozen=True, slots=True)
class Exchange:
    """The name and the kind of an exchange."""

    name: str
    kind: Literal["topic", "fanout", "direct"]


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue with its arguments.

    Shared queues are durable, because RabbitMQ 4.3 refuses transient ones.

    ``exchange``: an exchange that also routes messages to the queue; None: only AMQP's default exchange does.
    In each of these exchanges, the routing key is the queue's name.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    exclusive: bool = False
    auto_delete: bool = False
    exchange: Exchange | None = None


# Notices of changes. It does no harm if a consumer misses one, because every consumer also reads the complete
# state every few seconds. By routing key:
#
# - ``registry.changed``: registry -> router, autoscaler. JSON {revision, kind, name, action}.
# - ``demand.<deployment>``: gateway -> autoscaler. JSON {deployment}, at most one a second.
EVENTS = Exchange("tidegate.events.v1", "topic")
REGISTRY_CHANGED = "registry.changed"
DEMAND_PREFIX = "demand."

# Ids of requests whose caller has disconnected: gateway -> every worker, best effort.
CANCELS = Exchange("tidegate.cancels.v1", "fanout")

# This exchange carries everything that workers publish: replies, retries, exceptions. A worker may not
# publish to the default exchange, because the default exchange routes to every queue (see ``permissions``).
# Gateways and routers bind the queues to WORKERS.
WORKERS = Exchange("tidegate.workers.v1", "direct")

# Assignments for workers in a warm pool: autoscaler -> one waiting worker. The queue is warm.v1.<pool>.
WARM = Exchange("tidegate.warm.v1", "direct")

# Request frames that have no attempt left, and frames that could not be decoded: worker, gateway -> router.
# The router answers the callers and stores the frames as dead letters.
EXCEPTIONS = Queue("exceptions.v1", exchange=WORKERS)

# Usage reports: gateway -> registry. JSON, persistent, acked when they are in the database.
USAGE = Queue("usage.v1")

# A quorum queue drops a message after this many deliveries. The default of RabbitMQ 4.0 and later is 20. A
# job's record limits the attempts, so the queue must never drop the job's message. Every version of RabbitMQ
# accepts this number.
DELIVERIES = 1_000_000_000
JOBS_PREFIX = "jobs.v1."
REQUESTS_PREFIX = "requests.v1."
# In a queue's name, dots separate the parts. So a colon replaces each dot of a Deployment's name there. No
# Deployment's name has a colon, and AMQP libraries accept a colon in a queue's name.
_DOT = ":"
REPLIES_PREFIX = "replies.v1."
# If no worker uses a replica's own queue for this many milliseconds, the broker deletes the queue with its
# messages. A request that only prefers the replica is not lost: it moves to the shared queue after
# ``affinity_wait_ms``, which is always shorter.
REPLICA_QUEUE_EXPIRES_MS = 180_000


def word_of(deployment: str) -> str:
    """Return a Deployment's name as one part of a queue's name: a colon replaces each dot."""
    return deployment.replace(".", _DOT)


def deployment_of(queue: str) -> str:
    """Return the Deployment's name from its queue's name. Return an empty string for other queues.

    The queues of a Deployment are those of requests, suspects and jobs.
    """
    for prefix in (REQUESTS_PREFIX, JOBS_PREFIX):
        if queue.startswith(prefix):
            return queue.removeprefix(prefix).partition(".")[0].replace(_DOT, ".")
    return ""


def requests_queue(deployment: str, band: Band = "normal") -> Queue:
    """Return the queue of interactive requests: gateway -> the Deployment's workers.

    The messages are transient. Only language models have other bands than ``normal``. An envelope for a
    language model contains one request.
    """
    suffix = "" if band == "normal" else f".{band}"
    return Queue(f"{REQUESTS_PREFIX}{word_of(deployment)}{suffix}", exchange=WORKERS)


def replica_queue(deployment: str, replica: str, band: Band) -> Queue:
    """Return the queue of a band's requests that prefer a replica: gateway -> the replica's worker.

    The worker declares the queue. The gateway lets a message expire after the Deployment's
    ``affinity_wait_ms``. Then the broker moves the message to the band's shared queue, where any worker takes
    it.
    """
    shared = requests_queue(deployment, band)
    arguments = {
        "x-expires": REPLICA_QUEUE_EXPIRES_MS,
        "x-dead-letter-exchange": WORKERS.name,
        "x-dead-letter-routing-key": shared.name,
    }
    return Queue(f"{REQUESTS_PREFIX}{word_of(deployment)}.r.{word_of(replica)}.{band}", arguments)


def sequences_queue(deployment: str, replica: str) -> Queue:
    """Return the queue for the sequences of one replica: gateway -> the replica's worker.

    The gateway and the worker declare the queue. The messages never move to another replica, because only
    this replica has the state of the sequences.
    """
    name = f"{REQUESTS_PREFIX}{word_of(deployment)}.r.{word_of(replica)}.sequences"
    return Queue(name, {"x-expires": REPLICA_QUEUE_EXPIRES_MS})


def suspects_queue(requests: Queue) -> Queue:
    """Return the queue of suspects: worker -> the Deployment's workers.

    An envelope contains one request. The router declares and binds the queue, because workers may not bind
    queues. A worker runs a suspect immediately and alone in the model. So if a suspect is redelivered, no
    other request can have ended its worker.
    """
    return Queue(f"{requests.name}.suspects", exchange=WORKERS)


@lru_cache(maxsize=1024)
def jobs_queue(deployment: str, level: Level) -> Queue:
    """Return the queue of the jobs with one priority (``level``): gateway, router -> the workers.

    An envelope contains one request. Messages are persistent, confirmed and mandatory. The queue is created
    on first use. If a message is lost, it is published again from its job's record.
    """
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERIES}
    return Queue(f"{JOBS_PREFIX}{word_of(deployment)}.{level}", arguments)


def warm_queue(pool: str) -> Queue:
    """Return the queue of a warm pool's assignments: autoscaler -> one waiting worker.

    An assignment expires soon, so that no worker takes an old one.
    """
    return Queue(f"warm.v1.{pool}", exchange=WARM)


# A gateway process's queue of replies survives for this many seconds without a consumer.
REPLIES_KEPT_S = 60


def replies_queue(incarnation: str) -> Queue:
    """Return the queue of a gateway process's replies: worker, router -> gateway.

    The broker deletes the queue after 60 s without a consumer. So the queue survives a reconnect that takes
    less time.
    """
    return Queue(f"{REPLIES_PREFIX}{incarnation}", {"x-expires": REPLIES_KEPT_S * 1000}, exchange=WORKERS)


def events_queue(service: str, incarnation: str) -> Queue:
    """Return a service's own queue of events. RabbitMQ deletes it when the service's connection ends."""
    return Queue(f"events.v1.{service}.{incarnation}", exclusive=True, auto_delete=True)


def cancels_queue(replica: str, incarnation: str) -> Queue:
    """Return a worker's own queue of cancels. RabbitMQ deletes it when the worker's connection ends."""
    return Queue(f"cancels.v1.{replica}.{incarnation}", exclusive=True, auto_delete=True)


def demand_key(deployment: str) -> str:
    """Return the routing key of a gateway's notice that a Deployment needs a replica."""
    return f"{DEMAND_PREFIX}{deployment}"
