"""What was observed, what is to be done, and why: plain values between the loop and the decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.autoscaler.domain.launcher import Running
from tidegate.kernel.protocol.models import Deployment, DesiredState, Version
from tidegate.kernel.protocol.presence import GatewayView, ReplicaReport


@dataclass(frozen=True, slots=True)
class LocalOverride:
    """An operator's word that waits for the registry; ``replicas`` None lifts the registry's one."""

    replicas: int | None
    expires_at: float | None
    force: bool = False  # above the maximum, too


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine that replicas run on has. ``available_mb`` None: only its size is known."""

    cores: float
    memory_mb: int
    available_mb: int | None


class HostProbe(Protocol):
    """The interface that reads the resources of the host."""

    async def read(self) -> Host | None:
        """Return the resources of the host now; None if they are not known."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One observation. None always means "could not be read", never "nothing there".

    ``jobs`` counts those that are not over, by Deployment. ``hints`` holds the time of the last demand
    event by Deployment; ``launch_failures`` why a launch of the previous round failed, by replica.
    ``expected`` are the forecasts of arrivals a second, by Deployment. Nothing is started on a ``host`` that
    is ``cordoned``. ``room`` is what that host has; None: it is not known, and nothing is bounded by it.
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
    host: str = ""
    cordoned: frozenset[str] = frozenset()
    room: Host | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """How eager and how patient to be. Seconds unless said otherwise."""

    down_window_s: float = 30.0
    idle_s: float = 60.0  # scale to zero after so long, where the Deployment does not say
    hint_hold_s: float = 10.0  # a demand event counts as one request for so long
    # Arrivals are counted over at least so long, and longer for slow models and slow starts (``load.py``).
    rate_window_s: float = 10.0
    burst_window_s: float = 3.0
    longest_rate_window_s: float = 120.0
    trail_every_s: float = 5.0  # arrivals are kept so far apart, and for the time below, to see a trend
    trail_s: float = 60.0
    service_window_s: float = 30.0
    step_every_s: float = 5.0  # between steps up while the service rate is not known
    stuck_after_s: float = 15.0
    progress_timeout_s: float = 300.0  # work in hand and none done, where the Deployment does not say
    reports_return_s: float = 10.0  # heartbeats get so long to come back after the store did
    # A worker keeps its Deployment's limits by itself, and then says why: it gets so long to do so.
    start_grace_s: float = 5.0
    drain_grace_s: float = 10.0
    backoff_max_s: float = 60.0
    stable_after_s: float = 60.0  # a replica that was ready for so long does not crash-loop
    # What the host is good for (``capacity.py``).
    host_memory: float = 0.95  # no replica is started beyond this share of its memory
    replicas_per_core: float = 16.0
    replica_memory_mb: int = 256  # of one that neither declares its memory nor was measured
    starts_at_once: int = 0  # 0: twice the cores
    start_window_s: float = 20.0  # a replica that starts for longer is waiting, and no work for the host


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
    """Let a replica finish and exit."""

    replica: str
    cause: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End what is left of a replica. ``forget``: its heartbeat must not be read any longer."""

    replica: str
    cause: str
    forget: bool = True


Action = Launch | Drain | Kill


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one Deployment, and from what. Kept, and served to operators."""

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
    """What to do now, in order within each Deployment, and the decisions worth keeping."""

    actions: tuple[Action, ...] = ()
    decisions: tuple[Decision, ...] = ()
