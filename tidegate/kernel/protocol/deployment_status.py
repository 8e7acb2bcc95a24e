"""The status of Deployments, which the autoscaler writes for other services and for users."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tidegate.kernel.protocol.models import Noun


class Condition(Noun):
    """The result of a check, with the reason.

    ``at``: when the result last changed (seconds since the epoch).
    """

    type: str
    ok: bool
    reason: str = ""
    message: str = ""
    at: float = 0.0


class DeploymentStatus(Noun):
    """The status of a Deployment: its replicas, and how many the autoscaler wants. None means unknown.

    ``revision``: the revision of the Deployment that this status is about. ``rule``, ``reason``: the rule
    that decided ``desired``, and the reason. ``limits``: the smallest and the largest number of replicas that
    are allowed now. ``start_s``: seconds until a new replica is ready. ``devices``: the devices that the
    models of the Deployment run on. ``ended``: the last replicas that ended unexpectedly.
    """

    deployment: str
    revision: int | None = None
    desired: int = 0
    ready: int = 0
    starting: int = 0
    draining: int = 0
    queue: int | None = None
    demand: int | None = None
    arrival_rate: float | None = None
    service_rate: float | None = None
    utilization: float | None = None
    gpu_utilization: float | None = None
    gpu_memory_bytes: int | None = None
    devices: list[str] = Field(default_factory=list)
    predicted_wait_ms: float | None = None
    start_s: float | None = None
    cost_per_hour: float | None = None
    rule: str = ""
    reason: str = ""
    limits: tuple[int, int] | None = None
    conditions: list[Condition] = Field(default_factory=list)
    cold_starts: list[dict[str, Any]] = Field(default_factory=list)
    replicas: list[dict[str, Any]] = Field(default_factory=list)
    ended: list[dict[str, Any]] = Field(default_factory=list)
