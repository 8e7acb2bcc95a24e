"""Routes of canaries: start, promote, pause, resume, and progress.

Only the router calls ``progress``. It sends its decision about a canary.
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.application.transactions import Transactions
from services.registry.domain import rollouts, rollover, shadows
from services.registry.domain.desired_state import Change, RegistrySnapshot
from services.registry.domain.rollouts import Progress
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import CanaryOptions, Endpoint, Name, Noun, RolloutPhase
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["rollouts"], route_class=JsonRoute)
GUARDED = guarded("endpoint")


class RolloutBody(Noun):
    """The version or Deployment that becomes the canary."""

    version: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="A version of the model. If it has no Deployment, one is created.",
    )
    deployment: Name | None = Field(None, description="An existing Deployment, instead of a version.")
    options: CanaryOptions = CanaryOptions()
    swap: bool = Field(
        False,
        description=(
            "Swap: stop the present version first, for a host without room for both versions. Requests wait "
            "until the new version is ready. No canary is started."
        ),
    )


class ProgressBody(Noun):
    """The router's decision about a canary. ``id`` is the id of the rollout."""

    id: str
    phase: RolloutPhase
    step: Annotated[int, Field(ge=0, le=100)]
    reason: str = Field("", max_length=2000)


@router.post("/{name}/rollout", dependencies=[GUARDED], status_code=201)
async def start(transactions: TransactionsDep, name: str, body: RolloutBody, response: Response) -> Endpoint:
    """Start a canary. It gets the share of the first step as soon as it has a ready replica.

    Return 409 while another rollout is in progress.
    """
    if (body.version is None) == (body.deployment is None):
        raise BadRequest("Name the canary by version or by deployment, not by both.")
    now = transactions.now().timestamp()

    def decision(snapshot: RegistrySnapshot) -> list[Change]:
        changes: list[Change] = []
        deployment = body.deployment
        if body.version is not None:
            model = snapshot.heaviest(snapshot.endpoint(name).spec.targets).model
            request = rollover.DeployRequest(model, body.version, endpoint=name, traffic=False)
            plan = rollover.deploy(snapshot, request)
            changes, deployment = plan.changes, plan.deployment
        assert deployment is not None
        id_ = secrets.token_hex(4)
        snapshot = snapshot.after(changes)
        if body.swap:
            return changes + rollouts.swap(snapshot, name, deployment, id_, now)
        return changes + rollouts.start(snapshot, name, deployment, body.options, id_, now)

    return with_etag(await transactions.decide(decision, lambda reader: _read(reader, name)), response)


@router.post("/{name}/rollout/promote", dependencies=[GUARDED])
async def promote(transactions: TransactionsDep, name: str, response: Response) -> Endpoint:
    """Send all traffic to the canary now. If no canary is active, make the shadow the only target.

    A promoted shadow gets traffic when it is ready; until then the current Deployments serve.
    """

    def decision(snapshot: RegistrySnapshot) -> list[Change]:
        spec = snapshot.endpoint(name).spec
        if spec.shadow is not None and (spec.rollout is None or not spec.rollout.active):
            return shadows.promote(snapshot, name)
        return rollouts.advance(snapshot, name, None, progress, now)

    now, progress = transactions.now().timestamp(), Progress("promoted", "an operator promoted the canary")
    return with_etag(await transactions.decide(decision, lambda reader: _read(reader, name)), response)


@router.post("/{name}/rollout/pause", dependencies=[GUARDED])
async def pause(transactions: TransactionsDep, name: str, response: Response) -> Endpoint:
    """Keep a canary at its share. The router still rolls it back if its results are bad."""
    return await _advance(
        transactions, name, None, Progress("paused", "an operator paused the rollout"), response
    )


@router.post("/{name}/rollout/resume", dependencies=[GUARDED])
async def resume(transactions: TransactionsDep, name: str, response: Response) -> Endpoint:
    """Continue the steps of a paused canary."""
    return await _advance(
        transactions, name, None, Progress("running", "an operator resumed the rollout"), response
    )


@router.post("/{name}/rollout/progress", dependencies=[GUARDED])
async def progress(
    transactions: TransactionsDep, name: str, body: ProgressBody, response: Response
) -> Endpoint:
    """Apply the router's decision about a canary. Return 409 if another rollout has begun."""
    return await _advance(transactions, name, body.id, Progress(body.phase, body.reason, body.step), response)


async def _advance(
    transactions: Transactions, name: str, id: str | None, decided: Progress, response: Response
) -> Endpoint:
    now = transactions.now().timestamp()
    endpoint = await transactions.decide(
        lambda snapshot: rollouts.advance(snapshot, name, id, decided, now),
        lambda reader: _read(reader, name),
    )
    return with_etag(endpoint, response)


async def _read(reader: DesiredStateReader, name: str) -> Endpoint:
    return (await reader.endpoints(name))[0]
