"""Settings that only the router has. Only ``app.py`` and the modules that build its parts read them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from services.router.domain.dead_letters import DeadLetterLimits
from services.router.domain.drift import DriftPolicy
from services.router.domain.drift_history import WindowLimits
from services.router.domain.job_retention import Retention
from services.router.domain.quality_history import QualityLimits
from services.router.domain.webhooks import RetryPolicy, WebhookLimits
from tidegate.kernel.settings.base import Settings


class RouterSettings(Settings):
    """The router's settings. Each field is ``TIDEGATE_<FIELD>`` in the environment."""

    service: ClassVar[str] = "router"

    route_interval_s: float = Field(
        0.5, description="Seconds between two reads of the workers' reports by the router."
    )
    relist_interval_s: float = Field(
        2.0, description="Seconds between two reads of the registry by the router."
    )
    router_lease_s: float = Field(
        5.0,
        ge=1.0,
        description="Lease of the leading router, in seconds. If this router dies, another router leads "
        "after this time.",
    )
    blob_sweep_interval_s: float = Field(
        60.0, description="Seconds between two sweeps in which the router deletes expired large payloads."
    )
    dead_letters_kept: int = Field(
        1000, ge=0, description="How many dead letters are kept; the oldest are deleted first."
    )
    dead_letter_keep_s: float = Field(
        7 * 86_400, ge=1, description="Seconds for which a dead letter and its payload are kept."
    )
    dead_letter_bytes: int = Field(
        2**30,
        ge=0,
        description="Maximum number of bytes of all dead letters' payloads; the oldest are deleted first.",
    )
    job_sweep_interval_s: float = Field(
        1.0,
        gt=0,
        description="Seconds between two sweeps of the jobs. A sweep publishes lost messages again, ends "
        "expired jobs, and removes old records.",
    )
    jobs_kept: int = Field(
        1_000_000, ge=0, description="How many finished jobs are kept; the oldest are deleted first."
    )
    jobs_kept_bytes: int = Field(
        512 * 2**20,
        ge=0,
        description="Maximum memory of the jobs' store, in bytes. "
        "Above this limit, the oldest finished jobs are deleted. 0: no limit.",
    )
    jobs_kept_min_s: float = Field(
        300.0,
        ge=0,
        description="Seconds for which a finished job is kept even if the jobs' store is full.",
    )
    ledger_interval_s: float = Field(
        1.0, gt=0, description="Seconds between two readings of the ledger of jobs."
    )
    watch_interval_s: float = Field(
        5.0, gt=0, le=60, description="Seconds between two reads of the endpoints' traffic."
    )
    watch_day_s: float = Field(
        86_400.0,
        ge=10,
        description="Length of the days in which the callers of an endpoint are counted, in seconds. "
        "Only tests need shorter days.",
    )
    alert_group_s: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="Seconds for which alerts of an endpoint are collected in one message.",
    )
    alert_repeat_s: float = Field(
        14_400.0, gt=0, description="Seconds after which a firing alert is sent again."
    )
    smtp_url: str = Field(
        "",
        description="SMTP server for alerts: `smtp://USER:PASSWORD@HOST:587`, or `smtps://`. Empty: none.",
    )
    smtp_from: str = Field("tidegate@localhost", description="Sender address of e-mails about alerts.")
    webhook_timeout_s: float = Field(
        10.0, gt=0, le=50, description="How long a webhook's receiver may take to answer, in seconds."
    )
    webhook_first_retry_s: float = Field(
        5.0,
        gt=0,
        description="Seconds before the second attempt to send a webhook. "
        "Each later wait is three times as long as the one before.",
    )
    webhook_longest_retry_s: float = Field(
        10_800.0, gt=0, description="Longest wait between two attempts of a webhook, in seconds."
    )
    webhook_give_up_s: float = Field(
        43_200.0, gt=0, description="A webhook is retried until this many seconds after the end of its job."
    )
    webhooks_at_once: int = Field(
        64, ge=1, le=1024, description="Maximum number of webhooks in flight at the same time."
    )
    webhooks_per_host: int = Field(
        4, ge=1, le=1024, description="Maximum number of webhooks in flight to one host."
    )

    drift_window_rows: int = Field(
        3000, ge=100, description="Sampled rows in a window of drift. A window with fewer rows is not judged."
    )
    drift_window_s: float = Field(
        86_400.0,
        gt=0,
        description="Seconds after which a window of drift is closed, even if it has fewer than "
        "TIDEGATE_DRIFT_WINDOW_ROWS rows.",
    )

    quality_window_rows: int = Field(
        500, ge=50, description="Labels in a window in which the quality of a version is measured."
    )
    quality_window_s: float = Field(
        86_400.0,
        gt=0,
        description="Seconds after which a window of labels is closed, even if it has fewer than "
        "TIDEGATE_QUALITY_WINDOW_ROWS labels.",
    )
    quality_predictions: int = Field(
        50_000,
        ge=0,
        description="Maximum number of sampled predictions of a version that wait for labels; the oldest "
        "are dropped.",
    )

    def quality_limits(self) -> QualityLimits:
        """Return the limits for windows of labels and for predictions that wait for labels."""
        return QualityLimits(self.quality_window_rows, self.quality_window_s, self.quality_predictions)

    def drift_windows(self) -> WindowLimits:
        """Return the limits for windows of sampled rows."""
        return WindowLimits(self.drift_window_rows, self.drift_window_s)

    def drift_policy(self) -> DriftPolicy:
        """Return the settings that decide if a difference is drift."""
        return DriftPolicy(min_rows=self.drift_window_rows)

    def dead_letter_limits(self) -> DeadLetterLimits:
        """Return the limits for the number, the bytes and the age of dead letters."""
        return DeadLetterLimits(self.dead_letters_kept, self.dead_letter_keep_s, self.dead_letter_bytes)

    def job_retention(self) -> Retention:
        """Return the limits for the records of finished jobs."""
        return Retention(self.job_retention_s, self.jobs_kept, self.jobs_kept_bytes, self.jobs_kept_min_s)

    def webhook_limits(self) -> WebhookLimits:
        """Return the limits for webhooks in flight, and their timeout."""
        return WebhookLimits(self.webhooks_at_once, self.webhooks_per_host, self.webhook_timeout_s)

    def webhook_retry_policy(self) -> RetryPolicy:
        """Return the policy by which webhooks are retried and given up."""
        return RetryPolicy(self.webhook_first_retry_s, self.webhook_longest_retry_s, self.webhook_give_up_s)
