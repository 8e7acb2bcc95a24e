"""The objectives of an endpoint, and the limits of its alerts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from typing_extensions import Self


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ServiceLevel(_Part):
    """The objectives of an endpoint.

    ``availability``: the percent of requests that must not fail. ``latency_target``: the percent of answers
    that must arrive within ``latency_ms`` milliseconds. ``window``: the time over which the objectives are
    counted, in days (``30d``).
    """

    availability: float | None = Field(None, ge=50, lt=100)
    latency_ms: float | None = Field(None, gt=0, le=86_400_000)
    latency_target: float = Field(99.0, ge=50, lt=100)
    window: str = Field("30d", pattern=r"^[1-9][0-9]?d$")

    @model_validator(mode="after")
    def _has_an_objective(self) -> Self:
        if self.availability is None and self.latency_ms is None:
            raise ValueError("set availability, latency_ms, or both")
        return self

    @property
    def window_s(self) -> float:
        """Return the window in seconds."""
        return float(self.window[:-1]) * 86_400


class AlertLimits(_Part):
    """The limits of an endpoint's alerts. A limit of None means the default of the alert's rule.

    ``off``: the names of the rules that are switched off for this endpoint.
    """

    error_rate: float | None = Field(None, gt=0, le=100)
    p99_ratio: float | None = Field(None, gt=1, le=1000)
    queue_age_s: float | None = Field(None, gt=0, le=86_400)
    dead_letters: int | None = Field(None, ge=1, le=2**31 - 1)
    restarts: int | None = Field(None, ge=1, le=2**31 - 1)
    off: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{1,40}$")]] = Field(
        default_factory=list, max_length=32
    )
