"""The scaling options of a Deployment, and the time windows of a schedule."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

Aggressiveness = Literal["economy", "balanced", "latency"]
Season = Literal["off", "daily", "weekly"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ScheduleWindow(_Part):
    """A regular period with its own bounds on the number of replicas.

    ``start`` and ``end``: cron expressions of five fields that match when a period starts and ends, in the
    local time of ``time_zone`` (an IANA name). If a clock change skips such a time, the period starts or ends
    right after the change. If a clock change repeats it, the period starts or ends only once.
    """

    start: str
    end: str
    time_zone: str = "UTC"
    min_replicas: int | None = Field(None, ge=0, le=10_000)
    max_replicas: int | None = Field(None, ge=1, le=10_000)

    @field_validator("start", "end")
    @classmethod
    def _is_cron(cls, text: str) -> str:
        # This import is here, because users can install the command line without this library.
        from cronsim import CronSim, CronSimError

        if len(text.split()) != 5:
            raise ValueError(f"{text!r} is not a cron expression of five fields, such as '0 8 * * mon-fri'")
        try:
            next(CronSim(text, datetime(2024, 1, 1, tzinfo=timezone.utc)))
        except (CronSimError, StopIteration):
            raise ValueError(f"{text!r} is not a cron expression, or its time never comes") from None
        return text

    @field_validator("time_zone")
    @classmethod
    def _is_zone(cls, name: str) -> str:
        try:
            _zone(name)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"there is no time zone {name!r}: use a name such as Europe/Berlin") from None
        return name

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min_replicas is None and self.max_replicas is None:
            raise ValueError("a window of a schedule needs min_replicas, max_replicas or both")
        if self.max_replicas is not None and (self.min_replicas or 0) > self.max_replicas:
            raise ValueError("min_replicas of a window is above its max_replicas")
        return self

    def open_at(self, now: float) -> bool:
        """Return True if ``now`` is within a period of this window.

        ``now`` is in seconds since the epoch.
        """
        minute = int(now // 60)
        opened = _last(self.start, self.time_zone, minute)
        closed = _last(self.end, self.time_zone, minute)
        return opened is not None and (closed is None or opened >= closed)


class Scaling(_Part):
    """The scaling rules of a Deployment, besides its bounds and ``target_wait_ms``.

    Each rule computes a number of replicas, and the highest number is used.

    ``aggressiveness``: sets the defaults of the other fields.
    ``target_utilization``: the share of time that a replica may be busy.
    ``backlog_per_replica``: how many unanswered requests one replica should have.
    ``up_window_s``: scale up after a higher load has lasted for this many seconds.
    ``down_window_s``: scale down after a lower load has lasted for this many seconds.
    ``panic_factor``: scale up immediately, without windows and limits per minute, if the load needs at least
      this many times the number of ready replicas; 0: never.
    ``max_cost_per_hour``: the most that all replicas may cost per hour. One replica costs ``price_per_hour``.
    ``max_cost_per_day``, ``max_cost_per_month``: the most that all replicas may cost in a calendar day
      and month (UTC).
    ``over_budget``: what to do from the moment when a budget is used up until its day or month ends:
      ``minimum`` keeps ``min_replicas``, ``stop`` stops all replicas.
    ``forecast``: start replicas early if the load was high at the same time on earlier days (``daily``)
      or in earlier weeks (``weekly``).
    """

    aggressiveness: Aggressiveness = "balanced"
    target_utilization: float | None = Field(None, gt=0, le=1)
    backlog_per_replica: float | None = Field(None, gt=0)
    schedule: list[ScheduleWindow] = Field(default_factory=list, max_length=100)
    up_window_s: float | None = Field(None, ge=0, le=3600)
    down_window_s: float | None = Field(None, ge=0, le=86_400)
    max_up_per_minute: int | None = Field(None, ge=1, le=2**31 - 1)
    max_down_per_minute: int | None = Field(None, ge=1, le=2**31 - 1)
    panic_factor: float | None = Field(None, ge=0)
    price_per_hour: float | None = Field(None, gt=0)
    max_cost_per_hour: float | None = Field(None, gt=0)
    max_cost_per_day: float | None = Field(None, gt=0)
    max_cost_per_month: float | None = Field(None, gt=0)
    over_budget: Literal["minimum", "stop"] = "minimum"
    forecast: Season = "off"

    @field_validator("panic_factor")
    @classmethod
    def _is_factor(cls, factor: float | None) -> float | None:
        if factor is not None and 0 < factor <= 1:
            raise ValueError("panic_factor must be 0 (never) or above 1")
        return factor

    @model_validator(mode="after")
    def _can_pay(self) -> Self:
        if self.max_cost_per_hour is None:
            return self
        if self.price_per_hour is None:
            raise ValueError("max_cost_per_hour needs price_per_hour")
        if self.price_per_hour > self.max_cost_per_hour:
            raise ValueError("max_cost_per_hour is below price_per_hour, so the Deployment could never serve")
        return self

    def changes(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, for people."""
        return self.model_dump(mode="json", exclude_defaults=True)


@lru_cache(maxsize=4096)
def _last(cron: str, zone: str, minute: int) -> datetime | None:
    """Return the last time up to ``minute`` that a cron expression matches, or None.

    ``minute`` is in minutes since the epoch.
    """
    from cronsim import CronSim

    now = datetime.fromtimestamp(minute * 60, timezone.utc)
    local = datetime.fromtimestamp((minute + 1) * 60, _zone(zone))  # CronSim excludes its start
    # If ``fold`` is set, the clock was put back and shows this hour a second time. An earlier moment
    # can then have a later clock time, so the search starts two hours later.
    if local.fold:
        local += timedelta(hours=2)
    times = (found.astimezone(timezone.utc) for found in CronSim(cron, local, reverse=True))
    return next((found for found in times if found <= now), None)


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
