"""Routes to replay arrivals under other policies, and to check recorded decisions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from services.autoscaler.application.replay_runner import ReplayRunner
from services.autoscaler.domain.replay.arrivals import Shape
from services.autoscaler.domain.replay.comparison import KnownFormula
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["replay"], route_class=JsonRoute)

WEEK_S = 7 * 86_400.0
MAX_CSV = 64 * 2**20
# A request body may have at most this many bytes. JSON can double the size of a CSV, because JSON writes a
# newline with two characters.
MAX_BODY = 2 * MAX_CSV


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class SyntheticArrivals(_Body):
    """Random arrivals.

    Their rate follows ``shape``, between ``rps`` (requests a second) and ``factor`` times ``rps``.
    """

    kind: Literal["synthetic"] = "synthetic"
    shape: Shape = "spike"
    rps: float = Field(10.0, gt=0, le=100_000)
    factor: float = Field(10.0, gt=0, le=10_000)
    seconds: float = Field(600.0, gt=0, le=2 * WEEK_S)


class CsvArrivals(_Body):
    """Arrivals of a CSV file: lines of ``time`` or ``time,count``, with times in seconds or as dates."""

    kind: Literal["csv"]
    text: str = Field(max_length=MAX_CSV)
    seconds: float | None = Field(
        None, gt=0, le=2 * WEEK_S, description="Seconds to replay. Default: up to the end of the file."
    )


class RecordedArrivals(_Body):
    """Recorded arrivals: of the last ``seconds``, or between two times (seconds since the epoch)."""

    kind: Literal["recorded"]
    since: float | None = None
    until: float | None = None
    seconds: float = Field(3600.0, gt=0, le=WEEK_S)


class PolicyVariation(_Body):
    """A policy to compare: changes to the Deployment's own policy, as for `PATCH .../policy`."""

    name: str = Field(min_length=1, max_length=80)
    changes: dict[str, Any]


class ReplicaOptions(_Body):
    """Values of a replica that replace the measured ones. Times are in seconds (``_s``) or ms (``_ms``)."""

    call_ms: float | None = Field(None, gt=0)
    row_ms: float | None = Field(None, ge=0)
    batch: int | None = Field(None, ge=1)
    spread: float | None = Field(None, ge=0, lt=1)
    start_s: float | None = Field(None, ge=0)
    deadline_s: float | None = Field(None, gt=0)
    slots: int | None = Field(None, ge=1, le=4096)
    prompt_tokens: int | None = Field(None, ge=0)


class ReplayRequest(_Body):
    """A request for a replay. The comparison always includes the Deployment's own policy, as ``live``."""

    deployment: str
    arrivals: Annotated[SyntheticArrivals | CsvArrivals | RecordedArrivals, Field(discriminator="kind")] = (
        SyntheticArrivals()
    )
    policies: list[PolicyVariation] = Field(default_factory=list, max_length=10)
    others: list[KnownFormula] = Field(default_factory=list, max_length=2)
    service: ReplicaOptions = ReplicaOptions()
    start_at: float | None = Field(
        None,
        description="Start of the replay in seconds since the epoch. "
        "Schedules apply as if the replay ran at this time. "
        "Default: the start of a recording, otherwise the last midnight (UTC).",
    )
    seed: int = 0
    picture: bool = Field(False, description="Also return a picture of the replay (PNG in base64).")


class VerifyRequest(_Body):
    """The recorded rounds whose decisions are repeated. Default: all rounds.

    ``since`` and ``until`` are in seconds since the epoch.
    """

    deployment: str | None = None
    since: float = 0.0
    until: float = 1e12


def _replays(request: Request) -> ReplayRunner:
    found: ReplayRunner = request.app.state.replays
    return found


ReplayRunnerDep = Annotated[ReplayRunner, Depends(_replays)]


@router.post("/replay")
async def replay(body: ReplayRequest, replays: ReplayRunnerDep) -> dict[str, Any]:
    """Replay the arrivals under each policy. Return waits, late requests, replica-hours and costs."""
    document = body.model_dump(mode="json")
    arrivals = body.arrivals
    title = arrivals.shape if isinstance(arrivals, SyntheticArrivals) else arrivals.kind
    renamed = {"variants": document.pop("policies"), "title": title}
    return await replays.run(document.pop("deployment"), {**document, **renamed})


@router.post("/replay/verify")
async def verify(body: VerifyRequest, replays: ReplayRunnerDep) -> dict[str, Any]:
    """Decide the recorded rounds again, and compare the new decisions with the recorded ones."""
    return await replays.verify(body.since, body.until, body.deployment)
