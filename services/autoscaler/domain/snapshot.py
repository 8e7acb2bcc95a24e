"""The values that the control loop and the decisions exchange.

Do not rename fields: recordings contain their names, and later versions of Tidegate read old recordings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.autoscaler.domain.launcher import Running
from tidegate.kernel.protocol.models import Deployment, DesiredState, Version
from tidegate.kernel.protocol.presence import GatewayView, ReplicaReport


@dataclass(frozen=True, slots=True)
class LocalOverride:
    """An override that the registry does not have yet.

    If ``replicas`` is None, the registry's override is removed.
    """

    replicas: int | None
    expires_at: float | None
    force: bool = False  # ``replicas`` may exceed the maximum


@dataclass(frozen=True, slots=True)
class Host:
    """The resources of the machine that replicas run on.

    ``available_mb`` is None if it is not known how much memory is free.
    """

    cores: float
    memory_mb: int
    available_mb: int | None


class HostProbe(Protocol):
    """The interface that reads the resources of the host."""

    async def read(self) -> Host | None:
        """Return the resources of the host now; None if they are not known."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One observation. None always means that a value could not be read, never that it is empty.

    These fields are by Deployment: ``jobs`` has the number of unfinished jobs. ``hints`` has the time of the
    last demand event. ``expected`` has the forecast arrivals per second. ``over_budget`` has the message
    about a used-up budget.

    ``launch_failures`` has, by replica, the message of each launch that failed in the last round. If ``host``
    is one of the ``cordoned`` hosts, no replica is started on it. ``room`` has the resources of ``host``. If
    ``room`` is None, starts are not limited by memory and cores.
    """

    desired_state: DesiredState | None
    running: tuple[Running, ...] | None
    reports: Mapping[str, ReplicaReport] | None
    gateways: GatewayView | None
    jobs: Mapping[str, int] | None = field(default_factory=dict)
    hints: Mapping[str, float] = field(default_factory=dict)
    overrides: Mapping[str, LocalOverride] = field(default_factory=dict)
    launch_failures: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[str, float] = field(default_factory=dict)
    over_budget: Mapping[str, str] = field(default_factory=dict)
    host: str = ""
    cordoned: frozenset[str] = frozenset()
    room: Host | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The windows and limits that the autoscaler's decisions use, in seconds unless said otherwise."""

    down_window_s: float = 30.0
    idle_s: float = 60.0  # idle time before scale to zero, if the Deployment sets none
    hint_hold_s: float = 10.0  # seconds for which a demand event counts as one request
    # The shortest window for arrival rates. Slow models and slow starts need a longer one (``load.py``).
    rate_window_s: float = 10.0
    burst_window_s: float = 3.0
    longest_rate_window_s: float = 120.0
    trail_every_s: float = 5.0  # time between the samples of a trend, which are kept for ``trail_s``
    trail_s: float = 60.0
    service_window_s: float = 30.0
    step_every_s: float = 5.0  # time between two added replicas while the service rate is not known
    stuck_after_s: float = 15.0
    progress_timeout_s: float = (
        300.0  # longest time without a finished request, if the Deployment has no limit
    )
    reports_return_s: float = 10.0  # after the store's outage, missing heartbeats do not count for this long
    # A worker itself acts if a time limit of its Deployment is exceeded. Then it reports the reason. The
    # autoscaler waits this much longer than the limit, so that the report can arrive.
    start_grace_s: float = 5.0
    drain_grace_s: float = 10.0
    backoff_max_s: float = 60.0
    stable_after_s: float = 60.0  # a replica that was ready for this long is not in a crash loop
    # The limits of the host (``capacity.py``).
    host_memory: float = 0.95  # share of the host's memory that may be in use after a start
    replicas_per_core: float = 16.0
    replica_memory_mb: int = 256  # assumed for a replica without declared or measured memory
    starts_at_once: int = 0  # 0: twice the cores
    start_window_s: float = (
        20.0  # after this time, a starting replica no longer counts for ``starts_at_once``
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a replica."""

    replica: str
    slot: int
    generation: int
    deployment: Deployment
    version: Version
    cause: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Let a replica finish its work and exit."""

    replica: str
    cause: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a replica, and remove its container or files. ``forget``: also delete its heartbeat."""

    replica: str
    cause: str
    forget: bool = True


Action = Launch | Drain | Kill
_DONE: dict[type[Action], str] = {Launch: "started", Drain: "draining", Kill: "ended"}


def describe(action: Action) -> str:
    """Return an action as text, such as ``ended digits-v1-0-1 (drained)``."""
    return f"{_DONE[type(action)]} {action.replica} ({action.cause})"


@dataclass(frozen=True, slots=True)
class Decision:
    """A decision for one Deployment with its inputs. It is stored, and shown to operators."""

    at: float
    deployment: str
    rule: str
    reason: str
    before: int
    after: int
    inputs: dict[str, Any]
    actions: list[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of a round, and the decisions to store.

    The actions on one Deployment are in the order in which they must run.
    """

    actions: tuple[Action, ...] = ()
    decisions: tuple[Decision, ...] = ()
