"""Experiments: each compares two or more Deployments of an endpoint by the outcomes of their answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import Self

from tidegate.kernel.protocol.nouns import LARGEST, Name, Noun, Written
from tidegate.kernel.protocol.splitting import StickyTraffic

METRIC_PATTERN = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
MetricName = Annotated[str, StringConstraints(pattern=METRIC_PATTERN)]
# The header that is the default sticky key. Requests with the same value in this header stay at one variant.
UNIT_HEADER = "X-Unit-Id"


class ExperimentMetric(Written):
    """A metric by which variants are compared.

    ``kind``: ``mean`` is the mean of the reported numbers, and ``rate`` the share of reported labels that
    equal ``label``. The gateways measure the other two: ``latency`` is the mean time of an answer in
    milliseconds, and ``errors`` the share of failed requests.
    ``of``: the metric's name in the feedback; None: the same as ``name``, or "label" for a rate.
    ``goal``: the better direction.
    ``min_lift``: the smallest difference worth finding, as a fraction of the control's value.
    """

    name: MetricName
    kind: Literal["mean", "rate", "latency", "errors"] = "mean"
    label: str | None = Field(None, min_length=1, max_length=256)
    of: MetricName | None = None
    goal: Literal["up", "down"] = "up"
    min_lift: float = Field(0.05, gt=0, le=100)

    @model_validator(mode="after")
    def _has_its_label(self) -> Self:
        if (self.kind == "rate") != (self.label is not None):
            raise ValueError("a metric of the kind rate needs a label, and other kinds must not have one")
        return self

    @property
    def source(self) -> str:
        """Return the name of the metric in the feedback."""
        return self.of or ("label" if self.kind == "rate" else self.name)

    @property
    def measured(self) -> bool:
        """Return True if the gateways measure the metric, without feedback."""
        return self.kind in ("latency", "errors")


def default_metrics() -> list[ExperimentMetric]:
    """Return the default metrics of an experiment."""
    return [
        ExperimentMetric(name="score"),
        ExperimentMetric(name="errors", kind="errors", goal="down"),
        ExperimentMetric(name="latency", kind="latency", goal="down"),
    ]


class ExperimentOptions(Written):
    """The rules of an experiment.

    ``share``: percent of the traffic for all treatments together. ``sticky``: the key that keeps a unit, for
    example a user, at one variant. ``alpha``: the accepted probability of reporting a difference that does
    not exist. ``until``: the experiment is complete at this time at the latest. ``samples``: the experiment
    is complete when each variant has this many outcomes of the first metric.
    """

    share: int = Field(50, ge=1, le=99)
    metrics: list[ExperimentMetric] = Field(default_factory=default_metrics, min_length=1, max_length=20)
    sticky: StickyTraffic = StickyTraffic(by="header", name=UNIT_HEADER)
    alpha: float = Field(0.05, gt=0, le=0.5)
    until: datetime | None = None
    samples: int | None = Field(None, ge=1, le=LARGEST)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError("two metrics of the experiment have the same name")
        return self


ExperimentPhase = Literal["running", "complete", "stopped", "decided", "aborted"]


class ExperimentEvent(Noun):
    """A change of an experiment's phase.

    ``at``: the time of the change, in seconds since the epoch. ``phase``: the new phase. ``reason``: the
    reason for the change.
    """

    at: float
    phase: ExperimentPhase
    reason: str = ""


class Experiment(Noun):
    """A comparison of ``treatments`` with the Deployment ``control``. Times are seconds since the epoch.

    ``control``: empty means the endpoint's only target.
    ``sticky_before``: the endpoint's own sticky key, which is restored at the end.
    ``id``: set when the experiment starts.
    """

    treatments: list[Name] = Field(min_length=1, max_length=10)
    control: str = ""
    options: ExperimentOptions = ExperimentOptions()
    id: str = ""
    phase: ExperimentPhase = "running"
    since: float = 0.0
    ended: float | None = None
    reason: str = ""
    winner: str | None = None
    sticky_before: StickyTraffic | None = None
    history: list[ExperimentEvent] = Field(default_factory=list)

    @property
    def active(self) -> bool:
        """Return True if the experiment is running."""
        return self.phase == "running"

    @property
    def variants(self) -> list[str]:
        """Return the Deployments, the control first."""
        return [self.control, *self.treatments]
