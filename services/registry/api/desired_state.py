"""Routes for the desired state as a whole: read it, apply a file to it, deploy a version in one call."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.api.bodies import Applied, ApplyBody, DeployBody, Deployed
from services.registry.api.dependencies import TransactionsDep, set_etag
from services.registry.application.resolution import version_of
from services.registry.domain import differences, edits, rollover, stages, stated_models, stated_rollouts
from services.registry.domain.desired_state import Change, RegistrySnapshot
from services.registry.domain.differences import FieldChange
from services.registry.domain.references import of_version
from services.registry.domain.stated_rollouts import RolloutStart
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import require

router = APIRouter(prefix="/v1", tags=["desired state"], route_class=JsonRoute)


# Each process of the registry has its own prefix of ETags. The same revision can have other contents after a
# restore from a backup, and another JSON after an upgrade.
_PROCESS = secrets.token_hex(4)

_UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "The desired state has not changed: its ETag is in `If-None-Match`."}
}


@router.get("/desired-state", response_model=DesiredState, responses=_UNCHANGED)
# The older name of the route:
@router.get("/intention", response_model=DesiredState, responses=_UNCHANGED, deprecated=True)
async def read(
    transactions: TransactionsDep,
    response: Response,
    known: Annotated[
        str, Header(alias="If-None-Match", description="The ETag of the desired state that the caller has.")
    ] = "",
) -> Any:
    """Return the desired state at one revision: all Deployments and Endpoints, and their versions.

    Return 304 without a body if ``If-None-Match`` has the current ETag.
    """
    async with transactions.read() as reader:
        etag = f"{_PROCESS}.{await reader.desired_state_mark()}"
        if f'"{etag}"' in known:
            return Response(status_code=304, headers={"ETag": f'"{etag}"'})
        set_etag(response, etag)
        return await reader.desired_state()


@router.post("/deploy")
async def deploy(transactions: TransactionsDep, body: DeployBody) -> Deployed:
    """Serve a version.

    Create or change its Deployment, and start to move the Endpoint's traffic to this Deployment.

    If the Deployment is new and replaces another one, it copies that one's options. Options in the request
    take precedence.
    """
    plan: rollover.DeployPlan | None = None
    version = body.version
    if isinstance(version, str):
        async with transactions.read() as reader:
            version = (await version_of(reader, of_version(body.model, version))).number
    request = rollover.DeployRequest(body.model, version, body.deployment, body.endpoint, body.traffic)

    def decision(now: RegistrySnapshot) -> list[Change]:
        nonlocal plan
        plan = rollover.deploy(now, request)
        return plan.changes

    async def result(reader: DesiredStateReader) -> Deployed:
        assert plan is not None
        deployment = await reader.deployments(plan.deployment)
        endpoint = await reader.endpoints(plan.endpoint)
        return Deployed(deployment=deployment[0], endpoint=next(iter(endpoint), None))

    return await transactions.decide(decision, result)


@router.post("/apply")
async def apply(transactions: TransactionsDep, body: ApplyBody) -> Applied:
    """Create or replace many Deployments and Endpoints, and the policies and aliases of models.

    With ``prune``, also delete all other Endpoints, and the other Deployments that no Endpoint names. If any
    object has an error, change nothing.
    """
    plan = _ApplyPlan(body, transactions.now().timestamp())
    return await transactions.decide(plan.decide, plan.result)


# The dry run has a route of its own, and is not a parameter of ``/apply``. An older registry would ignore the
# parameter and make the changes.
@router.post("/apply/dry-run")
async def dry_run(transactions: TransactionsDep, body: ApplyBody) -> Applied:
    """Check everything that ``POST /v1/apply`` checks, and return what would change. Change nothing."""
    plan = _ApplyPlan(body, transactions.now().timestamp())
    return await transactions.preview(plan.decide, plan.result)


class _ApplyPlan:
    """The changes that a file describes. ``started_at``: the start time of new rollouts, in Unix time."""

    def __init__(self, body: ApplyBody, started_at: float) -> None:
        self._body = body
        self._started_at = started_at
        self._outcomes: list[edits.ApplyOutcome] = []
        self._adopted: set[str] = set()

    def decide(self, now: RegistrySnapshot) -> list[Change]:
        """Return the changes. Raise the errors of :func:`edits.apply`."""
        body = self._body
        undeclared = {name for name, stored in now.deployments.items() if not stored.declared}
        self._adopted = {str(fields.get("name")) for fields in body.deployments} & undeclared
        changes, self._outcomes = edits.apply(
            now, body.deployments, body.endpoints, self._put_endpoint, body.models, stated_models.put_model
        )
        if body.prune:
            deletions, outcomes = edits.prune(now.after(changes), body.deployments, body.endpoints)
            if body.deletions is not None:
                edits.check_deletions(outcomes, body.deletions)
            changes += deletions
            self._outcomes += outcomes
        if stages.changes_rules(now, changes):
            require(ADMIN)
        return changes

    async def result(self, writer: DesiredStateWriter) -> Applied:
        """Return the outcomes: first of the objects in the file, then of other objects that have changed."""
        changes = differences.of_objects(writer.entries)
        items: list[edits.ApplyOutcome] = []
        for each in self._outcomes:
            found = changes.pop((each.kind, each.name), [])
            if each.kind == "deployment" and each.name in self._adopted:
                found = [FieldChange(field="declared", before=False, after=True), *found]
            action = "updated" if found and each.action == "unchanged" else each.action
            items.append(replace(each, action=action, changes=found))
        others = [edits.ApplyOutcome(kind, name, "updated", found) for (kind, name), found in changes.items()]
        return Applied(revision=await writer.revision(), items=[*items, *others])

    def _put_endpoint(self, snapshot: RegistrySnapshot, name: str, fields: edits.Fields) -> list[Change]:
        start = RolloutStart(secrets.token_hex(4), self._started_at)
        return stated_rollouts.put_endpoint(snapshot, name, fields, start=start)
