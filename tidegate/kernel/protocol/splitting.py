"""The traffic policy of an endpoint: targets, rules, sticky keys, canaries and shadows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator
from typing_extensions import Self

from tidegate.kernel.protocol.nouns import LARGEST, Name, Noun, Written


class Target(Noun):
    """A Deployment that gets a share of an endpoint's traffic.

    The share is ``weight`` divided by the sum of the weights of all targets.
    """

    deployment: Name
    weight: int = Field(100, ge=0, le=1_000_000)


class TrafficRule(Noun):
    """A rule that sends requests to a Deployment. Rules apply before weights.

    The rule applies to a request that meets all conditions which are set. ``header``: the request has this
    header. ``value``: the header has this value. ``tenant``: the request comes from this caller (the id of a
    key).
    """

    deployment: Name
    header: str | None = Field(None, pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$", max_length=128)
    value: str | None = Field(None, max_length=1024)
    tenant: str | None = Field(None, min_length=1, max_length=255)

    @model_validator(mode="after")
    def _has_a_condition(self) -> Self:
        if self.header is None and (self.tenant is None or self.value is not None):
            raise ValueError("a rule needs a header or a tenant, and a value needs a header")
        return self


class StickyTraffic(Noun):
    """The sticky key: a header, a request parameter, or the caller's key.

    Requests with the same value stay at one target. Requests without the key are split by the weights.
    """

    by: Literal["header", "parameter", "key"]
    name: str | None = Field(None, min_length=1, max_length=128)

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if (self.by == "key") != (self.name is None):
            raise ValueError("sticky by header or parameter needs a name; sticky by key must not have a name")
        return self


class CanaryOptions(Written):
    """The rules of a canary.

    ``steps``: the canary's share of the traffic in each step, in percent and rising. A step of 100 is the
    promotion. Without such a step, the promotion follows the last step. ``hold_s``: the shortest duration of
    a step. ``min_samples``: the number of requests that the canary must get in a step before the next step
    begins. ``alpha``: the accepted probability of rolling back a canary that is as good as its baseline.
    ``tolerance``: how much the canary's share of failed or slow requests may exceed the baseline's share.
    ``patience_s``: a rollout pauses if a step lasts this many seconds and still has too little evidence for a
    decision. ``full_capacity``: True: start the canary's ``min_replicas`` in the first step. False: start
    only the step's share of them. ``metric``: a metric of the callers' feedback. The canary is judged by this
    metric too. ``direction``: ``up`` if higher values are better.
    """

    steps: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        default_factory=lambda: [1, 5, 25, 50, 100], min_length=1, max_length=20
    )
    hold_s: float = Field(60.0, ge=0, le=LARGEST)
    min_samples: int = Field(500, ge=1, le=LARGEST)
    alpha: float = Field(0.05, gt=0, le=0.5)
    tolerance: float = Field(0.01, ge=0, le=1)
    patience_s: float = Field(3600.0, gt=0, le=LARGEST)
    full_capacity: bool = False
    metric: str | None = Field(None, min_length=1, max_length=64)
    direction: Literal["up", "down"] = "up"

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if sorted(set(self.steps)) != self.steps:
            raise ValueError(f"steps must rise, got {self.steps}")
        return self


RolloutPhase = Literal["running", "paused", "promoted", "rolled_back", "aborted"]


class RolloutEvent(Noun):
    """An event of a rollout.

    ``at``: the time of the event, in seconds since the epoch. ``share``: the canary's share of the traffic
    after the event, in percent. ``reason``: why the event happened.
    """

    at: float
    phase: RolloutPhase
    share: int
    reason: str = ""


class Rollout(Noun):
    """A canary: ``deployment`` is compared with the ``base`` targets of an endpoint.

    ``step``: the index of the present step. ``history``: the last events, oldest first.
    ``min_replicas``: the canary's minimum after a promotion; None: the rollout does not change it.
    """

    deployment: Name
    base: list[Target] = Field(min_length=1)
    options: CanaryOptions = CanaryOptions()
    id: str = ""
    phase: RolloutPhase = "running"
    step: int = 0
    since: float = 0.0
    reason: str = ""
    history: list[RolloutEvent] = Field(default_factory=list)
    min_replicas: int | None = None

    @property
    def active(self) -> bool:
        """Return True if the rollout has not ended."""
        return self.phase in ("running", "paused")


class Tolerance(Written):
    """The largest accepted difference between a number of the primary and the shadow's number.

    The limit is ``atol`` + ``rtol`` x the absolute value of the primary's number.
    """

    atol: float = Field(1e-6, ge=0)
    rtol: float = Field(1e-4, ge=0)


class Shadow(Written):
    """Shadow traffic: copies of an endpoint's answered requests go to idle replicas of ``deployment``.

    ``rate``: how many percent of the answered requests are copied. ``max_per_s``: the most copies that each
    gateway process sends per second; None: no limit. ``wake``: True if copies also start a replica, and keep
    it running. ``until``: when the shadow ends; None: it ends only when somebody stops it. ``id``: identifies
    this shadow. The next shadow of the endpoint gets a new id.
    """

    deployment: Name
    rate: float = Field(100.0, gt=0, le=100)
    max_per_s: float | None = Field(None, gt=0, le=LARGEST)
    tolerance: Tolerance = Tolerance(atol=1e-6, rtol=1e-4)
    wake: bool = False
    until: AwareDatetime | None = None
    id: str = Field("", max_length=64)
