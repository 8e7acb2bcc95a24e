"""What the decisions carry from one round to the next. All values; times are epoch seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class Load:
    """The load on one Deployment. None: not known.

    ``new`` are the requests that arrived since the last round; ``ms_per_request`` is the model time
    that one request costs a replica, ``batch`` the requests that share a model call. ``guess`` says where
    ``ms_per_request`` comes from when these replicas have not been measured yet.
    """

    demand: int | None
    new: int
    arrival_rate: float | None
    ms_per_request: float | None
    batch: float
    guess: str = ""

    @property
    def service_rate(self) -> float | None:
        """Requests a second that one busy replica answers."""
        return None if not self.ms_per_request else 1000.0 / self.ms_per_request


@dataclass(frozen=True, slots=True)
class Sample:
    """Running totals at one time, for a rate over a window."""

    at: float
    count: float
    busy_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadMemory:
    """Totals that were seen (so that a restarted counter is no negative rate) and what they gave."""

    arrived: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    arrivals: tuple[Sample, ...] = ()
    services: tuple[Sample, ...] = ()
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
class StartTrouble:
    """Starts that failed in a row: the same version fails alike in every slot, so it is kept once."""

    failures: int = 0
    not_before: float = 0.0
    last_failure: float = 0.0
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentMemory:
    """One Deployment. ``recommended`` are the (time, replicas) that still hold it up,
    ``seen`` is the load of the last round."""

    target: int
    last_active: float
    recommended: tuple[tuple[float, int], ...] = ()
    load: LoadMemory = LoadMemory()
    seen: Load | None = None
    slots: Mapping[int, SlotMemory] = field(default_factory=dict)
    start: StartTrouble = StartTrouble()
    last_step: float = 0.0
    rule: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """One replica that runs, as far as its heartbeats told.

    ``installing_s``: what installing its version's requirements took, or takes; no part of its start.
    """

    first_seen: float
    last_report: float | None = None
    ready_at: float | None = None
    draining_since: float | None = None
    message: str = ""
    installing_s: float = 0.0


@dataclass(frozen=True, slots=True)
class State:
    """Everything between two rounds. ``generations`` outlives the process: the loop persists it.

    ``readable_since``: the store has answered since; ``evidence_since``: and somebody reports in it.
    """

    deployments: Mapping[str, DeploymentMemory] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaMemory] = field(default_factory=dict)
    generations: Mapping[tuple[str, int], int] = field(default_factory=dict)
    readable_since: float | None = None
    evidence_since: float | None = None
