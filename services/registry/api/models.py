"""Routes of models and their versions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from services.registry.adapters.sql.aliases import of_models
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.search import find, models_page
from services.registry.api.bodies import (
    Items,
    ModelInfo,
    NewVersion,
    Page,
    Registered,
    Restored,
    VersionCheck,
    VersionChecked,
    VersionInfo,
    VersionPatch,
)
from services.registry.api.dependencies import (
    DeletionDep,
    TransactionsDep,
    VersionsDep,
    guarded,
    with_version_etag,
)
from services.registry.api.searches import SearchDep, informed
from services.registry.application.lineage import Lineage, lineage_of
from services.registry.application.resolution import version_of
from services.registry.application.versions import Registration
from services.registry.domain import names
from services.registry.domain.desired_state import ChangeNotification
from services.registry.domain.filters import Condition, Subject
from services.registry.domain.references import Reference, of_version
from services.registry.domain.rollover import DeployRequest
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=JsonRoute)
GUARDED = guarded("version")

Number = Annotated[int, Path(ge=1, le=2**31 - 1)]
Permanent = Annotated[
    bool,
    Query(description=("Delete permanently: the version cannot be restored, and its artifact is removed.")),
]


@router.post("/{name}/versions", status_code=201)
async def register(versions: VersionsDep, name: str, body: NewVersion, response: Response) -> Registered:
    """Register an uploaded artifact as the model's next version.

    The call can be repeated. If a version has the same artifact, format, signature and requirements, return
    200 and that version. If the signature breaks callers of the latest version, return 409
    ``breaking_change``, unless ``breaking`` is set.
    """
    result = await versions.register(Registration(model=name, **dict(body)))
    response.status_code = 201 if result.new else 200
    registered = Registered(**dict(result.version), warnings=result.warnings)
    return with_version_etag(registered, response)


@router.post("/{name}/check")
async def check(versions: VersionsDep, name: str, body: VersionCheck) -> VersionChecked:
    """Check a version before its upload. Change nothing.

    The checks are the same as those of a registration and of a deploy.
    """
    fields = dict(body)
    deploy = DeployRequest(name, None, fields.pop("deployment"), fields.pop("endpoint"))
    size, artifact = fields.pop("size"), fields.pop("artifact") or ""
    result = await versions.check(Registration(model=name, artifact=artifact, **fields), size, deploy)
    return VersionChecked(
        format=result.format, stored=result.stored, version=result.version, warnings=result.warnings
    )


@router.get("")
async def list_models(
    transactions: TransactionsDep,
    search: SearchDep,
    name: Annotated[str | None, Query(description="Only models whose name contains this text.")] = None,
) -> Page[ModelInfo]:
    """Return every model with its latest version, sorted by name.

    With ``filter``, return only models that have a matching version.
    """
    async with transactions.read() as reader:
        names_, following = await models_page(reader.connection, search, name)
        return Page(items=await _models(reader, names_), next=following)


@router.get("/{name}")
async def get_model(transactions: TransactionsDep, name: str) -> ModelInfo:
    """Return one model with its latest version."""
    async with transactions.read() as reader:
        found = await _models(reader, [name])
    if not found:
        raise names.unknown("model", name)
    return found[0]


@router.delete("/{name}")
async def delete_model(
    deletion: DeletionDep,
    name: str,
    cascade: Annotated[
        bool, Query(description="Also delete the Deployments and Endpoints that serve the model.")
    ] = False,
    permanent: Permanent = False,
) -> Items[ChangeNotification]:
    """Delete a model with all its versions. Unless ``permanent`` is set, they can be restored for a while.

    If Deployments run the model or it has aliases, return 409 with their names. With ``cascade``, delete
    these Deployments, their Endpoints and the aliases too. Version numbers are never used again, not even by
    a new model of the same name.
    """
    return Items(items=await deletion.delete_model(name, cascade=cascade, permanent=permanent))


@router.post("/{name}/restore")
async def restore_model(deletion: DeletionDep, name: str) -> Restored:
    """Restore all deleted versions of a model. Its Deployments and Endpoints stay deleted."""
    return Restored(versions=await deletion.restore(name, None))


@router.post("/{name}/versions/{number}/restore")
async def restore_version(deletion: DeletionDep, name: str, number: Number) -> Restored:
    """Restore a deleted version."""
    return Restored(versions=await deletion.restore(name, number))


@router.get("/{name}/versions")
async def list_versions(transactions: TransactionsDep, name: str, search: SearchDep) -> Page[VersionInfo]:
    """Return the versions of a model that match ``filter``, sorted by ``order_by``. Default: oldest first."""
    mine = Condition(Subject("column", "model", "text"), "=", (name,))
    async with transactions.read() as reader:
        found, following = await find(
            reader.connection, replace(search, conditions=[mine, *search.conditions])
        )
        if not found and not await reader.numbers([name]):
            raise names.unknown("model", name)
        return Page(items=await informed(reader, found), next=following)


@router.get("/{name}/versions/{number}")
async def get_version(
    transactions: TransactionsDep,
    name: str,
    number: Annotated[str, Path(description="A version's number or alias, or `latest`.")],
    response: Response,
) -> VersionInfo:
    """Return one version. The ``ETag`` is a digest of its metadata and signature."""
    async with transactions.read() as reader:
        found = await version_of(reader, of_version(name, number))
        return with_version_etag((await informed(reader, [found]))[0], response)


@router.get("/{name}/versions/{number}/lineage")
async def get_lineage(transactions: TransactionsDep, name: str, number: Number) -> Lineage:
    """Return the lineage of a version: its ancestors, and the versions made from it."""
    async with transactions.read() as reader:
        return await lineage_of(reader, await version_of(reader, Reference(name, number)))


@router.patch("/{name}/versions/{number}", dependencies=[GUARDED])
async def describe_version(
    versions: VersionsDep, name: str, number: Number, body: VersionPatch, response: Response
) -> Version:
    """Replace or patch a version's metadata, or add a signature to a version without one."""
    found = await versions.describe(name, number, body.metadata, body.signature, body.metadata_patch)
    return with_version_etag(found, response)


@router.delete("/{name}/versions/{number}", dependencies=[GUARDED], status_code=204)
async def delete_version(
    deletion: DeletionDep, name: str, number: Number, permanent: Permanent = False
) -> None:
    """Delete a version. It can be restored for a while, unless ``permanent`` is set.

    If Deployments run the version or an alias points to it, return 409 with their names.
    """
    await deletion.delete_version(name, number, permanent=permanent)


async def _models(reader: DesiredStateReader, names_: list[str]) -> list[ModelInfo]:
    created, numbers = await reader.model_created(names_), await reader.numbers(names_)
    latest, aliases = await reader.latest_versions(names_), await of_models(reader.connection, names_)
    return [
        ModelInfo(
            name=name,
            created_at=created[name],
            versions=numbers[name],
            aliases=aliases.get(name, {}),
            latest=latest[name],
        )
        for name in names_
        if name in latest
    ]
