"""Routes of experiments: start, stop, choose the winner, and complete.

Only the router calls ``complete``.
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.api.dependencies import TransactionsDep, guarded, with_etag
from services.registry.domain import experiments, rollover
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.experiments import ExperimentOptions
from tidegate.kernel.protocol.models import LARGEST, Endpoint, Name, Noun
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/endpoints", tags=["experiments"], route_class=JsonRoute)
GUARDED = guarded("endpoint")

_MOST = 10


class ExperimentBody(Noun):
    """The treatments of an experiment: versions or Deployments to compare with the current version."""

    versions: list[Annotated[int, Field(ge=1, le=LARGEST)]] = Field(
        default_factory=list,
        max_length=_MOST,
        description="Versions of the model. Their Deployments are created if they do not exist.",
    )
    deployments: list[Name] = Field(
        default_factory=list,
        max_length=_MOST,
        description=("Existing Deployments, in addition to the versions."),
    )
    options: ExperimentOptions = ExperimentOptions()


class WinnerBody(Noun):
    """The variant that gets all traffic."""

    deployment: Name


class CompleteBody(Noun):
    """The router's report that an experiment is complete. ``id`` is the id of the experiment."""

    id: str
    reason: str = Field("", max_length=2000)


@router.post("/{name}/experiment", dependencies=[GUARDED], status_code=201)
async def start(
    transactions: TransactionsDep, name: str, body: ExperimentBody, response: Response
) -> Endpoint:
    """Start an experiment. Outcomes count from the moment when each variant has a ready replica.

    Return 409 while a rollout or another experiment is in progress.
    """
    if not body.versions and not body.deployments:
        raise BadRequest("Name at least one treatment, by `versions` or by `deployments`.")
    now = transactions.now().timestamp()

    def decision(snapshot: RegistrySnapshot) -> list[Change]:
        changes: list[Change] = []
        treatments = list(body.deployments)
        for version in body.versions:
            after = snapshot.after(changes)
            model = after.heaviest(after.endpoint(name).spec.targets).model
            plan = rollover.deploy(
                after, rollover.DeployRequest(model, version, endpoint=name, traffic=False)
            )
            changes += plan.changes
            treatments.append(plan.deployment)
        id_ = secrets.token_hex(4)
        return changes + experiments.start(snapshot.after(changes), name, treatments, body.options, id_, now)

    return with_etag(await transactions.decide(decision, lambda reader: _read(reader, name)), response)


@router.post("/{name}/experiment/stop", dependencies=[GUARDED])
async def stop(transactions: TransactionsDep, name: str, response: Response) -> Endpoint:
    """Stop an experiment. The control gets all traffic."""
    now = transactions.now().timestamp()
    endpoint = await transactions.decide(
        lambda snapshot: experiments.end(
            snapshot, name, None, "stopped", "an operator stopped the experiment", now
        ),
        lambda reader: _read(reader, name),
    )
    return with_etag(endpoint, response)


@router.post("/{name}/experiment/winner", dependencies=[GUARDED])
async def winner(transactions: TransactionsDep, name: str, body: WinnerBody, response: Response) -> Endpoint:
    """Send all traffic to a variant. This works during an experiment and after its end."""
    now = transactions.now().timestamp()
    endpoint = await transactions.decide(
        lambda snapshot: experiments.choose(snapshot, name, body.deployment, now),
        lambda reader: _read(reader, name),
    )
    return with_etag(endpoint, response)


@router.post("/{name}/experiment/complete", dependencies=[GUARDED])
async def complete(
    transactions: TransactionsDep, name: str, body: CompleteBody, response: Response
) -> Endpoint:
    """End an experiment that has enough samples or has run long enough. The control gets all traffic."""
    now = transactions.now().timestamp()
    endpoint = await transactions.decide(
        lambda snapshot: experiments.end(snapshot, name, body.id, "complete", body.reason, now),
        lambda reader: _read(reader, name),
    )
    return with_etag(endpoint, response)


async def _read(reader: DesiredStateReader, name: str) -> Endpoint:
    return (await reader.endpoints(name))[0]
