"""Routes of dead letters. Only operators may call them, because payloads are private data of callers."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from services.router.application.dead_letters import DeadLetters
from services.router.application.replays import Replays
from services.router.domain.dead_letters import DeadLetter, matching
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.access import OPERATE, Principal
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import needs

log = telemetry.logger(__name__)

router = APIRouter(prefix="/v1/dead", tags=["dead letters"], route_class=JsonRoute)
Operator = Annotated[Principal, Depends(needs(OPERATE))]


class ReplayOne(BaseModel):
    """The options of a replay.

    ``to``: the Deployment that runs the request again; None: the Deployment that the dead letter was for.
    """

    model_config = ConfigDict(extra="forbid")

    to: str | None = None


class ReplayMany(ReplayOne):
    """The options for many replays. ``deployment``: replay only the letters of this Deployment."""

    deployment: str | None = None


def _letters(request: Request) -> DeadLetters:
    letters: DeadLetters = request.app.state.dead_letters
    return letters


def _replays(request: Request) -> Replays:
    replays: Replays = request.app.state.replays
    return replays


@router.get("")
async def list_all(
    request: Request,
    _: Operator,
    deployment: str | None = None,
    cause: str | None = None,
    limit: int = Query(100, ge=1, le=10_000),
) -> dict[str, Any]:
    """List the latest dead letters, newest first."""
    letters = matching(_letters(request).all, deployment, cause)[-limit:]
    return {"items": [letter.public() for letter in reversed(letters)]}


@router.post("/replay")
async def replay_all(request: Request, operator: Operator, body: ReplayMany) -> dict[str, Any]:
    """Run the dead letters of ``body.deployment`` again as jobs; None means all Deployments.

    Letters without a payload are skipped. Letters that were replayed before are skipped too.
    """
    letters = matching(_letters(request).all, body.deployment, None)
    new = [letter for letter in letters if letter.payload and not letter.replays]
    return {"items": [await _replay(request, letter, body.to, operator) for letter in new]}


@router.get("/{id}")
async def get(request: Request, _: Operator, id: str) -> dict[str, Any]:
    """Return one dead letter, with the states of its replays."""
    letter = _letters(request).get(id)
    return letter.public() | {"replays": await _replays(request).outcomes(letter)}


@router.get("/{id}/payload")
async def payload(request: Request, operator: Operator, id: str) -> Response:
    """Return the payload: the request's frame (docs/envelope.md), or bytes that could not be decoded."""
    letter = _letters(request).get(id)
    body = await _letters(request).payload(letter)
    log.info("the payload of a dead letter was read", extra={"letter": id, "by": operator.id})
    return Response(body, media_type="application/octet-stream")


@router.post("/{id}/replay")
async def replay(request: Request, operator: Operator, id: str, body: ReplayOne) -> dict[str, Any]:
    """Run one letter again, as a job; return the letter with its replays."""
    letter = await _replays(request).replay(_letters(request).get(id), body.to, operator.id)
    return letter.public() | {"replays": await _replays(request).outcomes(letter)}


@router.delete("/{id}", status_code=204)
async def delete(request: Request, operator: Operator, id: str) -> Response:
    """Delete one letter and its payload."""
    await _letters(request).delete(_letters(request).get(id))
    log.info("dead letter deleted", extra={"letter": id, "by": operator.id})
    return Response(status_code=204)


async def _replay(
    request: Request, letter: DeadLetter, to: str | None, operator: Principal
) -> dict[str, Any]:
    """Replay a letter. Return its job or the error, so that one failure does not stop other replays."""
    try:
        replayed = await _replays(request).replay(letter, to, operator.id)
    except TidegateError as error:
        return {"letter": letter.letter, "job": None, "error": error.message}
    return {"letter": letter.letter, "job": replayed.replays[-1].job, "error": None}
