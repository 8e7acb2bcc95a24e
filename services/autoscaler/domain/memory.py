"""The state that decisions keep from one round to the next. Times are seconds since the epoch.

Field names are stored in the recordings, which later versions read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["starting", "ready", "draining"]

# How many start times `State.starts` keeps for each Deployment.
STARTS_KEPT = 5


@dataclass(frozen=True, slots=True)
class RuleNeed:
    """The number of replicas that one rule demands, and the reason."""

    rule: str
    replicas: int
    why: str


@dataclass(frozen=True, slots=True)
class Target:
    """The target number of replicas, the rule that set it, and the reason.

    ``terms`` are the needs of all rules before bounds, windows and limits. ``low`` and ``high`` are the
    bounds. ``asked`` is the number before the host limited it; None: the host did not limit it.
    """

    replicas: int
    rule: str
    reason: str
    terms: tuple[RuleNeed, ...] = ()
    low: int = 0
    high: int = 0
    asked: int | None = None


@dataclass(frozen=True, slots=True)
class LlmLoad:
    """The load of a language model.

    ``waiting`` requests with ``waiting_tokens`` prompt tokens have no event yet. The engines of all ready
    replicas together have ``slots``. In these slots are ``running`` requests; ``engine_waiting`` requests
    wait in the engines' own queues. The KV caches have room for ``kv_total`` tokens and hold ``kv_used``.
    ``tokens_per_s`` is how many prompt tokens the engines together read in a second; None if not known.
    """

    waiting: int = 0
    waiting_tokens: int = 0
    slots: int = 0
    running: int = 0
    engine_waiting: int = 0
    kv_used: int = 0
    kv_total: int = 0
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one Deployment. A field is None if it is not known. Rates are requests per second.

    ``new`` are the requests that arrived since the last round. ``ms_per_request`` is the model time of a
    request in one of a replica's ``slots`` (model instances). While the replicas are not measured yet, this
    time is an estimate, and ``guess`` names its source. ``batch`` is the number of requests that share a
    model call. ``at_least`` is the known part of the demand. ``burst_rate`` is the arrival rate over a
    shorter window. ``trend`` is the steady growth of the arrival rate in a second. ``expected`` is the
    forecast of the arrival rate when a replica that starts now is ready. ``utilization`` is the share of time
    in which replicas were busy; ``gpu_utilization`` is the same for their GPUs. ``measured`` is True if
    replicas have finished requests within the window. ``llm`` is for language models. ``sequences`` is the
    number of sequences that the replicas of a stateful model keep; each replica can keep ``sequence_slots``.
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
    llm: LlmLoad | None = None
    sequences: int = 0
    sequence_slots: int = 0

    @property
    def service_rate(self) -> float | None:
        """Return the requests a second that one busy replica serves."""
        return None if not self.ms_per_request else 1000.0 * self.slots / self.ms_per_request

    def busy(self, rate: float | None) -> float:
        """Return how many replicas are busy with arrivals at ``rate``; 0 while this is not known."""
        served = self.service_rate
        return (rate or 0.0) / served if served else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals at one moment. The difference of two samples gives a rate.

    ``offered_ms`` is the time in which replicas could serve requests.
    """

    at: float
    count: float
    busy_ms: float = 0.0
    offered_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """The totals that each gateway and worker last reported, and the samples computed from them.

    A total that becomes smaller counts as no growth, so a restarted process does not cause a negative rate.
    ``trail`` are samples of arrivals over a longer time than ``arrivals``, farther apart. ``trend`` is how
    fast the arrival rate grows. ``prompts`` are the prompt tokens that each engine had read, and ``read`` are
    samples of their sum.
    """

    arrived: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    arrivals: tuple[Sample, ...] = ()
    services: tuple[Sample, ...] = ()
    trail: tuple[Sample, ...] = ()
    trend: float = 0.0
    ms_per_request: float | None = None
    batch: float = 1.0
    prompts: Mapping[str, int] = field(default_factory=dict)
    read: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """The failures in a row of one slot's replicas. Only failures of replicas that had been ready count."""

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class StartFailures:
    """The failed starts in a row. They count for all slots together, because the version causes them."""

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class EndedReplica:
    """A replica that failed, as the status shows it."""

    replica: str
    cause: str
    message: str
    at: float


@dataclass(frozen=True, slots=True)
class DeploymentMemory:
    """The memory of one Deployment.

    ``recommended`` are the needs (time, replicas) that still prevent scaling down, ``lowest`` those that
    still prevent scaling up. ``moves`` are the changes of the target in the last minute, as (time, change).
    ``seen`` is the load of the last round and ``wanted`` its target. ``ended`` are the last failures, newest
    first. ``replica_mb`` is the highest measured memory of a replica of this configuration. ``put_off`` is
    the number of starts that wait for other starts or for room.
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
    """The memory of one running replica, from its heartbeats.

    ``installing_s`` is the time to install the version's requirements, which does not count as start time.
    ``progress`` is its number of finished requests and its busy time. ``progress_at`` is when one of these
    last changed, or when the replica last had nothing to do.
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
    """Everything that is kept between two rounds. The control loop stores ``generations`` on disk.

    The store has answered since ``readable_since``, and has had live heartbeats since ``evidence_since``.
    ``starts`` are the seconds that the last starts of each Deployment took, newest first. ``first_starts``
    are the seconds that a start took when the Deployment's version was verified.
    """

    deployments: Mapping[str, DeploymentMemory] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaMemory] = field(default_factory=dict)
    generations: Mapping[tuple[str, int], int] = field(default_factory=dict)
    readable_since: float | None = None
    evidence_since: float | None = None
    starts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    first_starts: Mapping[str, float] = field(default_factory=dict)
