"""Settings of the autoscaler, ``TIDEGATE_<FIELD>`` in the environment. Read by ``app.py`` only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.autoscaler.domain.snapshot import Policy
from tidegate.settings import Settings


class AutoscalerSettings(Settings):
    """Times are seconds."""

    launcher: Literal["process"] = Field("process", description="Where workers are started.")
    autoscaler_period_s: float = Field(0.5, gt=0, description="Time between two looks.")
    autoscaler_relist_s: float = Field(2.0, gt=0, description="Time between two reads of the registry.")
    autoscaler_down_window_s: float = Field(
        30.0, ge=0, description="Load counts for so long on the way down."
    )
    autoscaler_idle_s: float = Field(
        60.0, ge=0, description="Idle time before zero, where the Deployment does not say."
    )
    autoscaler_stuck_after_s: float = Field(
        15.0, gt=0, description="Silence after which a worker is replaced."
    )
    autoscaler_backoff_max_s: float = Field(
        60.0, ge=0, description="Longest wait before a worker is retried."
    )
    autoscaler_decisions_kept: int = Field(5000, ge=1, description="Decisions that are kept on disk.")

    def policy(self) -> Policy:
        """The part of the settings that decisions depend on."""
        return Policy(
            down_window_s=self.autoscaler_down_window_s,
            idle_s=self.autoscaler_idle_s,
            stuck_after_s=self.autoscaler_stuck_after_s,
            backoff_max_s=self.autoscaler_backoff_max_s,
        )
