"""The state that decisions keep from one round to the next. Times are seconds since the epoch.

Do not rename fields: recordings contain their names, and later versions of Tidegate read old recordings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["starting", "ready", "draining"]

# For each Deployment, `State.starts` keeps the durations of this many starts.
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

    ``terms``: the number of replicas that each rule demands, before bounds, windows and limits. ``low`` and
    ``high``: the bounds. ``asked``: the target before the host limited it; None if the host did not limit it.
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

    ``waiting``: the requests whose answer has not begun, with ``waiting_tokens`` prompt tokens. ``slots``:
    the engine slots of all ready replicas. ``running``: the requests in these slots. ``engine_waiting``: the
    requests in the engines' own queues. ``kv_total``: the tokens that fit into all KV caches. ``kv_used``:
    the tokens in them now. ``tokens_per_s``: the prompt tokens that the engines together read in a second;
    None if not known.
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

    ``new`` is the number of requests that arrived since the last round. ``ms_per_request`` is the model time
    of a request in one of a replica's ``slots`` (model instances). Before replicas are measured, this time is
    an estimate, and ``guess`` names its source. ``batch`` is the number of requests that share a model call.
    ``at_least`` is the known part of the demand; it is set even if ``demand`` is None. ``burst_rate`` is the
    arrival rate over a shorter window. ``trend`` is how much the arrival rate grows per second, if it grows
    steadily. ``expected`` is the highest forecast rate until a replica that starts now is ready.
    ``utilization`` is the share of time in which replicas were busy; ``gpu_utilization`` is the same for
    their GPUs. ``measured`` is True if replicas have finished requests within the window. ``llm`` is for
    language models. ``sequences`` is the number of sequences that the replicas of a stateful model keep.
    ``sequence_slots`` is the number of sequences that one replica can keep.
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
        """Return how many replicas are busy at an arrival rate; 0 if the service rate is not known."""
        served = self.service_rate
        return (rate or 0.0) / served if served else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals at one moment. The difference of two samples gives a rate.

    ``offered_ms`` is the time in which replicas could serve requests. ``busy_ms`` is the time in which they
    did.
    """

    at: float
    count: float
    busy_ms: float = 0.0
    offered_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """The totals that each gateway and worker last reported, and the samples computed from them.

    If a total becomes smaller, its growth counts as 0. So a restarted process does not cause a negative rate.
    ``trail`` has samples of arrivals like ``arrivals``, but over a longer time and at longer intervals.
    ``trend`` is how much the arrival rate grows per second. ``prompts`` has the number of prompt tokens that
    each engine had computed at its last report. ``read`` has samples of the prompt tokens that all engines
    together have computed.
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
    """The consecutive failures of the replicas in one replica slot of a Deployment.

    A failure counts only if the replica had been ready before.
    """

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class StartFailures:
    """The consecutive failed starts of a Deployment.

    They are counted together for all replica slots, because the version causes them.
    """

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
    """The facts about one Deployment that decisions keep from round to round.

    ``recommended`` and ``lowest`` have needs of earlier rounds, as (time, replicas). Needs in ``recommended``
    can still prevent scaling down. Needs in ``lowest`` can still prevent scaling up. ``moves`` has the
    changes of the target in the last minute, as (time, change). ``seen`` is the load of the last round, and
    ``wanted`` is the target of that round. ``ended`` has the last failures, newest first. ``replica_mb`` is
    the highest measured RAM of a replica of this configuration, in MiB. ``put_off`` is the number of starts
    that must wait for other starts, for RAM or for cores.
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
    """The facts from a running replica's heartbeats that decisions keep from round to round.

    ``installing_s``: the time to install the version's requirements; it does not count as start time.
    ``progress``: the number of finished requests, and the busy time in ms. ``progress_at``: when ``progress``
    last changed, or when the replica last had no request, whichever is later.
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
