"""What the decisions carry from one round to the next. All values; times are epoch seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["starting", "ready", "draining"]

# Of each Deployment, in `State.starts`.
STARTS_KEPT = 5


@dataclass(frozen=True, slots=True)
class RuleNeed:
    """What one rule alone asks for, and why."""

    rule: str
    replicas: int
    why: str


@dataclass(frozen=True, slots=True)
class Target:
    """The wanted number of replicas, by which rule, and the reason in words.

    ``terms`` are what the rules asked for before bounds, windows and limits, ``low`` and ``high`` the bounds.
    ``asked`` is the number before the host bounded it; None: it did not.
    """

    replicas: int
    rule: str
    reason: str
    terms: tuple[RuleNeed, ...] = ()
    low: int = 0
    high: int = 0
    asked: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The load on one Deployment. None: not known.

    ``new`` are the requests that arrived since the last round; ``ms_per_request`` is the model time
    that one request costs one of a replica's ``slots`` (model instances), ``batch`` the requests that share
    a model call. ``guess`` says where ``ms_per_request`` comes from when these replicas have not been
    measured yet. ``at_least`` is the part of the demand that is known. ``burst_rate`` is the arrival rate
    over a shorter window, ``trend`` its steady growth (requests a second, each second), ``expected`` what
    the forecast says of the time when a replica that is started now is ready. ``utilization`` is the share
    of its time that a replica was busy, ``gpu_utilization`` that of its GPUs as these say themselves.
    ``measured``: replicas have finished work in the last while.
    """

    demand: int | None
    new: int
    arrival_rate: float | None
    ms_per_request: float | None
    batch: float
    guess: str = ""
    slots: int = 1
    at_least: int = 0
    burst_rate: float | None = None
    trend: float = 0.0
    expected: float | None = None
    utilization: float | None = None
    gpu_utilization: float | None = None
    measured: bool = False

    @property
    def service_rate(self) -> float | None:
        """Requests a second that one busy replica answers."""
        return None if not self.ms_per_request else 1000.0 * self.slots / self.ms_per_request

    def busy(self, rate: float | None) -> float:
        """How many replicas arrivals at ``rate`` keep busy all the time; 0 while that is not known."""
        served = self.service_rate
        return (rate or 0.0) / served if served else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Running totals at one time, for a rate over a window. ``offered_ms`` is the time that replicas had."""

    at: float
    count: float
    busy_ms: float = 0.0
    offered_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """Totals that were seen (so that a restarted counter is no negative rate) and what they gave.

    ``trail`` are arrivals, further apart and further back than ``arrivals``, and ``trend`` is theirs.
    """

    arrived: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    arrivals: tuple[Sample, ...] = ()
    services: tuple[Sample, ...] = ()
    trail: tuple[Sample, ...] = ()
    trend: float = 0.0
    ms_per_request: float | None = None
    batch: float = 1.0


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """How often in a row the replicas of a slot ended badly after they had been ready."""

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class StartFailures:
    """Starts that failed in a row: the same version fails alike in every slot, so it is kept once."""

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class EndedReplica:
    """A replica that ended as it should not have, for people."""

    replica: str
    cause: str
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class DeploymentMemory:
    """One Deployment. ``recommended`` are the (time, replicas) that still hold it up, ``lowest`` those that
    still hold it down, ``moves`` the (time, change) of the target within the last minute. ``seen`` is the
    load of the last round, ``wanted`` the target that came of it, ``ended`` the last ends, newest first.
    ``replica_mb`` is the most memory that a replica of this configuration was seen to take, ``put_off`` how
    many starts wait for others to be over or for room.
    """

    target: int
    last_active: float
    recommended: tuple[tuple[float, int], ...] = ()
    load: LoadMemory = LoadMemory()
    lowest: tuple[tuple[float, int], ...] = ()
    moves: tuple[tuple[float, int], ...] = ()
    panic_until: float = 0.0
    seen: Load | None = None
    wanted: Target | None = None
    ended: tuple[EndedReplica, ...] = ()
    slots: Mapping[int, SlotMemory] = field(default_factory=dict)
    start: StartFailures = StartFailures()
    last_step: float = 0.0
    rule: str = ""
    fingerprint: str = ""
    replica_mb: int = 0
    put_off: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """One replica that runs, as far as its heartbeats told.

    ``installing_s``: what installing its version's requirements took, or takes; no part of its start.
    ``progress`` is what it had finished and how long its model had been busy, since ``progress_at``.
    """

    first_seen: float
    last_report: float | None = None
    ready_at: float | None = None
    draining_since: float | None = None
    message: str = ""
    installing_s: float = 0.0
    progress: tuple[int, float] = (0, 0.0)
    progress_at: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """Everything between two rounds. ``generations`` outlives the process: the loop persists it.

    ``readable_since``: the store has answered since; ``evidence_since``: and somebody reports in it.
    ``starts`` are the seconds that the last replicas of each Deployment took to become ready, newest first.
    """

    deployments: Mapping[str, DeploymentMemory] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaMemory] = field(default_factory=dict)
    generations: Mapping[tuple[str, int], int] = field(default_factory=dict)
    readable_since: float | None = None
    evidence_since: float | None = None
    starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
