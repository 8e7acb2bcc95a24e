"""Routes of the policies of models, and of the retention of versions."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, WithJsonSchema

from services.registry.api.dependencies import RetentionDep, guarded, with_content_etag
from services.registry.domain.model_policy import ModelPolicy, RetentionPolicy
from services.registry.domain.retention import Fate
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Noun
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.openapi import inlined

router = APIRouter(prefix="/v1/models/{name}", tags=["models"], route_class=JsonRoute)
GUARDED = guarded("policy")

# This type is a dict and not a pydantic class, because an absent field and null have different meanings. The
# domain checks the fields.
PolicyPatch = Annotated[dict[str, Any], WithJsonSchema(inlined(ModelPolicy))]


class Retained(BaseModel):
    """The versions of a model, oldest first, each with the decision to keep or delete it.

    ``applied``: False for a dry run, which deletes nothing.
    """

    applied: bool
    items: list[Fate]


@router.get("/policy")
async def get_policy(retention: RetentionDep, name: str, response: Response) -> ModelPolicy:
    """Return a model's policy."""
    return with_content_etag(await retention.policy(name), response)


@router.patch("/policy", dependencies=[GUARDED])
async def change_policy(
    retention: RetentionDep, name: str, body: PolicyPatch, response: Response
) -> ModelPolicy:
    """Change a model's policy by a JSON merge patch. A new retention is applied within ten minutes."""
    return with_content_etag(await retention.change_policy(name, body), response)


class RetentionRequest(Noun):
    """The retention to try with ``dry_run``; None means the retention of the model's policy."""

    retention: RetentionPolicy | None = None


@router.post("/retention")
async def apply_retention(
    retention: RetentionDep,
    name: str,
    body: RetentionRequest,
    dry_run: Annotated[bool, Query(description="Only return what would be deleted.")] = False,
) -> Retained:
    """Delete the versions that the model's policy does not keep. They can be restored for a while.

    With ``dry_run``, only return which versions would be deleted.
    """
    if body.retention is not None and not dry_run:
        raise BadRequest(
            "A body with a retention needs dry_run=true. To change the retention, PATCH the policy."
        )
    items = await (retention.plan(name, body.retention) if dry_run else retention.apply(name))
    return Retained(applied=not dry_run, items=items)
