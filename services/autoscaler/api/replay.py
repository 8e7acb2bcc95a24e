"""HTTP doors of the replay: other policies on the same arrivals, and the check of what was decided."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from services.autoscaler.application.replay_runner import ReplayRunner
from services.autoscaler.domain.replay.arrivals import Shape
from services.autoscaler.domain.replay.comparison import Other
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["replay"], route_class=JsonRoute)

WEEK_S = 7 * 86_400.0
MAX_CSV = 64 * 2**20
# The text as JSON, whose newlines take two characters each, and the rest of an order.
MAX_BODY = 2 * MAX_CSV


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Synthetic(_Part):
    """Arrivals by chance whose rate follows a shape, between ``rps`` and ``factor`` times that."""

    kind: Literal["synthetic"] = "synthetic"
    shape: Shape = "spike"
    rps: float = Field(10.0, gt=0, le=100_000)
    factor: float = Field(10.0, gt=0, le=10_000)
    seconds: float = Field(600.0, gt=0, le=2 * WEEK_S)


class Uploaded(_Part):
    """Arrivals of a CSV file: lines of ``time`` or ``time,count``, times as seconds or dates."""

    kind: Literal["csv"]
    text: str = Field(max_length=MAX_CSV)
    seconds: float | None = Field(None, gt=0, le=2 * WEEK_S, description="How long; default: to the end.")


class Recorded(_Part):
    """Arrivals as they were: the last ``seconds``, or between two times (seconds since the epoch)."""

    kind: Literal["recorded"]
    since: float | None = None
    until: float | None = None
    seconds: float = Field(3600.0, gt=0, le=WEEK_S)


class PolicyVariation(_Part):
    """Another policy: what differs from the Deployment's own, as for a change of it."""

    name: str = Field(min_length=1, max_length=80)
    changes: dict[str, Any]


class Replica(_Part):
    """What a replica is like, where that is not to be as it was measured. Times in ms or seconds (``_s``)."""

    call_ms: float | None = Field(None, gt=0)
    row_ms: float | None = Field(None, ge=0)
    batch: int | None = Field(None, ge=1)
    spread: float | None = Field(None, ge=0, lt=1)
    start_s: float | None = Field(None, ge=0)
    deadline_s: float | None = Field(None, gt=0)


class ReplayRequest(_Part):
    """What to replay. Beside ``policies`` there is always ``live``, the Deployment's own."""

    deployment: str
    arrivals: Annotated[Synthetic | Uploaded | Recorded, Field(discriminator="kind")] = Synthetic()
    policies: list[PolicyVariation] = Field(default_factory=list, max_length=10)
    others: list[Other] = Field(default_factory=list, max_length=2)
    service: Replica = Replica()
    start_at: float | None = Field(None, description="The beginning, for schedules; default: midnight UTC.")
    seed: int = 0
    picture: bool = Field(False, description="Whether to draw it as well, as PNG in base64.")


class Check(_Part):
    """Which recorded rounds to decide again (seconds since the epoch); default: all that there are."""

    deployment: str | None = None
    since: float = 0.0
    until: float = 1e12


def _replays(request: Request) -> ReplayRunner:
    found: ReplayRunner = request.app.state.replays
    return found


Core = Annotated[ReplayRunner, Depends(_replays)]


@router.post("/replay")
async def replay(order: ReplayRequest, core: Core) -> dict[str, Any]:
    """Replay the arrivals under each policy; return waits, lateness, replica-hours, cost and the course."""
    document = order.model_dump(mode="json")
    arrivals = order.arrivals
    told = arrivals.shape if isinstance(arrivals, Synthetic) else arrivals.kind
    renamed = {"variants": document.pop("policies"), "title": told}
    return await core.run(document.pop("deployment"), {**document, **renamed})


@router.post("/replay/verify")
async def verify(check: Check, core: Core) -> dict[str, Any]:
    """Decide the recorded observations again, and compare with what was decided live."""
    return await core.verify(check.since, check.until, check.deployment)
