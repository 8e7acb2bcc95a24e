"""The HTTP door of the router for dead letters. Their payloads are private data of tenants."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from services.router.application.dead_letters import DeadLetters
from services.router.application.replays import Replays
from services.router.domain.dead_letters import DeadLetter, wanted
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.access import OPERATE, Principal
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import needs

log = telemetry.logger(__name__)

router = APIRouter(prefix="/v1/dead", tags=["dead letters"], route_class=JsonRoute)
Operator = Annotated[Principal, Depends(needs(OPERATE))]


class ReplayOne(BaseModel):
    """Run on the Deployment ``to``, if not on the one that it was for."""

    model_config = ConfigDict(extra="forbid")

    to: str | None = None


class ReplayMany(ReplayOne):
    """Replay only the letters of ``deployment``. What was replayed before is left out."""

    deployment: str | None = None


def _letters(request: Request) -> DeadLetters:
    found: DeadLetters = request.app.state.dead_letters
    return found


def _replays(request: Request) -> Replays:
    found: Replays = request.app.state.replays
    return found


@router.get("")
async def listed(
    request: Request,
    _: Operator,
    deployment: str | None = None,
    cause: str | None = None,
    limit: int = Query(100, ge=1, le=10_000),
) -> dict[str, Any]:
    """List the latest dead letters, newest first."""
    found = wanted(_letters(request).all, deployment, cause)[-limit:]
    return {"items": [letter.shown() for letter in reversed(found)]}


@router.post("/replay")
async def replay_all(request: Request, who: Operator, asked: ReplayMany) -> dict[str, Any]:
    """Run all letters again, as jobs, that have a payload and were not replayed yet."""
    found = wanted(_letters(request).all, asked.deployment, None)
    fresh = [letter for letter in found if letter.payload and not letter.replays]
    return {"items": [await _tried(request, letter, asked.to, who) for letter in fresh]}


@router.get("/{id}")
async def shown(request: Request, _: Operator, id: str) -> dict[str, Any]:
    """Return one dead letter, and what became of its replays."""
    letter = _letters(request).get(id)
    return letter.shown() | {"replays": await _replays(request).outcomes(letter)}


@router.get("/{id}/payload")
async def payload(request: Request, who: Operator, id: str) -> Response:
    """Return the payload: the request's frame (docs/envelope.md), or bytes that could not be decoded."""
    letter = _letters(request).get(id)
    body = await _letters(request).payload(letter)
    log.info("payload of a dead letter read", extra={"letter": id, "by": who.id})
    return Response(body, media_type="application/octet-stream")


@router.post("/{id}/replay")
async def replay(request: Request, who: Operator, id: str, asked: ReplayOne) -> dict[str, Any]:
    """Run one letter again, as a job; return the letter with its replays."""
    letter = await _replays(request).replay(_letters(request).get(id), asked.to, who.id)
    return letter.shown() | {"replays": await _replays(request).outcomes(letter)}


@router.delete("/{id}", status_code=204)
async def delete(request: Request, who: Operator, id: str) -> Response:
    """Delete one letter and its payload."""
    await _letters(request).delete(_letters(request).get(id))
    log.info("dead letter deleted", extra={"letter": id, "by": who.id})
    return Response(status_code=204)


async def _tried(request: Request, letter: DeadLetter, to: str | None, who: Principal) -> dict[str, Any]:
    """Return a replay, or why there is none: one that fails does not stop the others."""
    try:
        done = await _replays(request).replay(letter, to, who.id)
    except TidegateError as error:
        return {"letter": letter.letter, "job": None, "error": error.message}
    return {"letter": letter.letter, "job": done.replays[-1].job, "error": None}
