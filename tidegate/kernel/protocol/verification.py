"""The verification of a version before it serves, and the version's measured capacity."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from tidegate.kernel.protocol.nouns import LARGEST, Noun, Written

VerificationState = Literal["unchecked", "pending", "verified", "rejected", "skipped"]
# A version in one of these states gets traffic only if its Deployment sets `unverified`.
REFUSED_STATES: tuple[VerificationState, ...] = ("pending", "rejected")
NOT_VERIFIED = "not_verified"
MAX_MESSAGE = 4000
# Calls of a new replica seldom have more rows than this, because larger calls need many concurrent callers.
USUAL_ROWS = 8
MAX_SAMPLES = 100


class BatchFigures(Noun):
    """The measurements of calls with ``rows`` rows.

    ``p50_ms``, ``p99_ms``: the 50th and 99th percentile of a call's duration. ``rows_per_s``: how many rows
    all calls together processed per second.
    """

    rows: int = Field(ge=1, le=LARGEST)
    p50_ms: float
    p99_ms: float
    rows_per_s: float


class CapacityCard(Noun):
    """The figures of a version that a scratch replica measured, on a machine with ``cpu`` and ``cores``.

    ``requests_per_s``: how many requests of one row a replica can answer per second, with the best batch
    size. None: the model was not called. ``memory_mb``: the memory of the replica's processes. ``start_s``:
    seconds from the launch until the model was warm, without the installation of requirements. ``load_ms``:
    the part of the start in which Triton loaded the model.
    """

    requests_per_s: float | None = None
    batches: list[BatchFigures] = Field(default_factory=list)
    memory_mb: int = 0
    load_ms: float = 0.0
    start_s: float = 0.0
    cpu: str = ""
    cores: int = 0
    device: str = ""
    measured_at: datetime

    @property
    def expected_rps(self) -> float | None:
        """Return the expected requests per second of a new replica; None if it is not known.

        The estimate counts a request as one row. It uses only the measurements of calls with at most
        ``USUAL_ROWS`` rows. If there are none, it is ``requests_per_s``.
        """
        usual = [each.rows_per_s for each in self.batches if each.rows <= USUAL_ROWS]
        return max(usual, default=self.requests_per_s)


class Verification(Noun):
    """The verification of a version.

    ``state``: an ``unchecked`` version was never checked. A ``pending`` one waits for its scratch replica. A
    ``verified`` one passed the check, and a ``rejected`` one failed it. A ``skipped`` one cannot be checked.
    ``message``: the reason of the state, with Triton's own message.
    ``round``: the number of verifications of the version. ``at``: the time of the last change.
    """

    state: VerificationState = "unchecked"
    message: str = Field("", max_length=MAX_MESSAGE)
    round: int = Field(0, ge=0, le=LARGEST)
    at: datetime | None = None
    card: CapacityCard | None = None

    @property
    def refused(self) -> bool:
        """Return True if new Deployments and targets must not use the version."""
        return self.state in REFUSED_STATES


class VerificationOptions(Written):
    """A publisher's options for the verification of a version.

    ``deployment``: options of the scratch replica's Deployment, such as ``env`` and ``resources``.
    ``samples``: inference requests that the version must answer. Each may have ``expected`` outputs and a
      ``tolerance``.
    """

    deployment: dict[str, Any] = Field(default_factory=dict)
    samples: list[dict[str, Any]] = Field(default_factory=list, max_length=MAX_SAMPLES)


class VerificationResult(Noun):
    """The result of one round of a verification: ``verified``, ``rejected`` or ``skipped``, and why."""

    round: int = Field(ge=0, le=LARGEST)
    state: Literal["verified", "rejected", "skipped"]
    message: str = Field("", max_length=MAX_MESSAGE)
    card: CapacityCard | None = None


class ScratchTask(Noun):
    """The samples that a scratch replica checks in one round of a verification."""

    round: int = Field(ge=0, le=LARGEST)
    samples: list[dict[str, Any]] = Field(default_factory=list)


class ScratchOutcome(Noun):
    """The outcome that a scratch replica reports in its heartbeats.

    ``rejected``: the model is wrong, and another round would fail as well.
    ``died``: a process of the model ended unexpectedly.
    ``interrupted``: the round ended early for an unknown reason, so it is repeated.
    ``unavailable``: a part of the platform failed, so the round is repeated until that part works.
    """

    round: int
    kind: Literal["verified", "rejected", "died", "interrupted", "unavailable"]
    message: str = ""
    card: CapacityCard | None = None
