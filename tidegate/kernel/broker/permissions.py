"""The permissions of each service at RabbitMQ and at the stores. The stack sets these permissions there.

In RabbitMQ, a service needs ``configure`` to declare a queue or an exchange, ``write`` to publish to an
exchange, and ``read`` to consume from a queue. To bind a queue to an exchange, it needs ``write`` for the
queue and ``read`` for the exchange.

A service that may publish to the default exchange can publish to every queue. So workers, registry and
autoscaler may not publish to it. They have their own exchanges (see ``topology``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidegate.kernel.broker.topology import CANCELS, EVENTS, EXCEPTIONS, USAGE, WARM, WORKERS

DEFAULT_EXCHANGE = "amq.default"


@dataclass(frozen=True, slots=True)
class BrokerPermissions:
    """The permissions of a service at RabbitMQ: regular expressions for names of queues and exchanges."""

    configure: str
    write: str
    read: str


def _names(*names: str, below: tuple[str, ...] = ()) -> str:
    """Return a regular expression for ``names``, and for all names that begin with one of ``below``."""
    choices = [re.escape(name) for name in names] + [f"{re.escape(prefix)}.*" for prefix in below]
    return f"^({'|'.join(choices)})$"


_OF_GATEWAY, _OF_ROUTER, _OF_AUTOSCALER = "events.v1.gateway.", "events.v1.router.", "events.v1.autoscaler."
_REQUESTS, _REPLIES, _JOBS, _WARM = "requests.v1.", "replies.v1.", "jobs.v1.", "warm.v1."

BROKER: dict[str, BrokerPermissions] = {
    "gateway": BrokerPermissions(
        configure=_names(
            EVENTS.name, CANCELS.name, WORKERS.name, USAGE.name,
            below=(_REPLIES, _REQUESTS, _JOBS, _OF_GATEWAY),
        ),
        write=_names(
            DEFAULT_EXCHANGE, EVENTS.name, CANCELS.name, below=(_REPLIES, _REQUESTS, _OF_GATEWAY)
        ),
        read=_names(EVENTS.name, WORKERS.name, below=(_REPLIES, _OF_GATEWAY)),
    ),
    "registry": BrokerPermissions(
        configure=_names(EVENTS.name, USAGE.name),
        write=_names(EVENTS.name),
        read=_names(USAGE.name),
    ),
    "router": BrokerPermissions(
        configure=_names(
            EVENTS.name, CANCELS.name, WORKERS.name, EXCEPTIONS.name, below=(_REQUESTS, _JOBS, _OF_ROUTER)
        ),
        write=_names(
            DEFAULT_EXCHANGE, CANCELS.name, WORKERS.name, EXCEPTIONS.name, below=(_REQUESTS, _OF_ROUTER)
        ),
        read=_names(EVENTS.name, WORKERS.name, EXCEPTIONS.name, below=(_OF_ROUTER,)),
    ),
    "autoscaler": BrokerPermissions(
        configure=_names(EVENTS.name, WARM.name, below=(_OF_AUTOSCALER, _WARM)),
        write=_names(WARM.name, below=(_OF_AUTOSCALER, _WARM)),
        read=_names(EVENTS.name, WARM.name, below=(_OF_AUTOSCALER,)),
    ),
    # A worker may not bind a queue to WORKERS, because it could then copy the replies of other workers. It
    # may not configure an exchange, because it could then delete the exchange that carries all replies.
    "worker": BrokerPermissions(
        configure=_names(below=(_REQUESTS, _JOBS, _WARM, "cancels.v1.")),
        write=_names(WORKERS.name, below=("cancels.v1.",)),
        read=_names(CANCELS.name, below=(_REQUESTS, _JOBS, _WARM, "cancels.v1.")),
    ),
}  # fmt: skip

# No service may administer a store's server. The server's owner does this from the command line.
_EVERYTHING = "~* &* +@all -@admin -@dangerous +info"
_WORKERS_FACTS = " ".join(
    f"~tidegate:{kind}:*" for kind in ("replica", "model", "claim", "statistics", "profile", "bins", "time")
)
# An offer says which replica a waiting worker becomes. The autoscaler writes the offers, and workers may only
# read them.
_WORKERS_OFFERS = "%R~tidegate:offer:*"
_NOT_FOR_WORKERS = "-scan -randomkey -function -move"
_WORKERS_COMMANDS = (
    f"resetchannels -@all +@read +@write +@connection +@transaction -@dangerous {_NOT_FOR_WORKERS}"
)

LIVE_STORE: dict[str, str] = dict.fromkeys(("gateway", "registry", "router", "autoscaler"), _EVERYTHING) | {
    # A worker reports about itself. It may not write route tables or the status of Deployments, and may not
    # read the limits of callers.
    "worker": f"{_WORKERS_FACTS} {_WORKERS_OFFERS} {_WORKERS_COMMANDS}",
}
JOB_STORE: dict[str, str] = dict.fromkeys(("gateway", "registry", "router", "autoscaler"), _EVERYTHING) | {
    # A worker needs the jobs, but not the routers' lease. If it could write this lease, it could prevent
    # every router from becoming the leader.
    "worker": f"{_EVERYTHING.replace('~* &*', '~tidegate:job:* &tidegate:job:*')} {_NOT_FOR_WORKERS}",
}
