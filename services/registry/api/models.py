"""Routes of models and their versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from services.registry.api.bodies import (
    Items,
    ModelInfo,
    NewVersion,
    Registered,
    VersionCheck,
    VersionChecked,
    VersionPatch,
)
from services.registry.api.dependencies import TransactionsDep, VersionsDep
from services.registry.application.transactions import Transactions
from services.registry.application.versions import Registration
from services.registry.domain import names
from services.registry.domain.desired_state import ChangeNotification
from services.registry.domain.rollover import DeployRequest
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=JsonRoute)

Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.post("/{name}/versions", status_code=201)
async def register(versions: VersionsDep, name: str, body: NewVersion, response: Response) -> Registered:
    """Register an uploaded artifact as the model's next version.

    A call can be repeated: if a version has the same artifact, format, signature and requirements, return 200
    and that version. If the signature breaks callers of the latest version, return 409 ``breaking_change``,
    unless ``breaking`` is set.
    """
    result = await versions.register(Registration(model=name, **dict(body)))
    response.status_code = 201 if result.new else 200
    return Registered(**dict(result.version), warnings=result.warnings)


@router.post("/{name}/check")
async def check(versions: VersionsDep, name: str, body: VersionCheck) -> VersionChecked:
    """Report the errors that a registration and a deploy would have, before the upload. Change nothing."""
    fields = dict(body)
    deploy = DeployRequest(name, None, fields.pop("deployment"), fields.pop("endpoint"))
    size, artifact = fields.pop("size"), fields.pop("artifact") or ""
    result = await versions.check(Registration(model=name, artifact=artifact, **fields), size, deploy)
    return VersionChecked(
        format=result.format, stored=result.stored, version=result.version, warnings=result.warnings
    )


@router.get("")
async def list_models(transactions: TransactionsDep) -> Items[ModelInfo]:
    """Return every model with its latest version."""
    return Items(items=await _models(transactions, None))


@router.get("/{name}")
async def get_model(transactions: TransactionsDep, name: str) -> ModelInfo:
    """Return one model with its latest version."""
    return (await _models(transactions, name))[0]


@router.delete("/{name}")
async def delete_model(
    versions: VersionsDep,
    name: str,
    cascade: Annotated[
        bool, Query(description="Also delete the Deployments and Endpoints that serve it.")
    ] = False,
) -> Items[ChangeNotification]:
    """Delete a model with all its versions.

    If it is in use, return 409 with its Deployments, unless ``cascade`` is set.

    Version numbers are never used again, not even by a new model of the same name.
    """
    return Items(items=await versions.delete_model(name, cascade=cascade))


@router.get("/{name}/versions")
async def list_versions(transactions: TransactionsDep, name: str) -> Items[Version]:
    """Return the versions of a model, oldest first."""
    return Items(items=await _versions(transactions, name))


@router.get("/{name}/versions/{number}")
async def get_version(transactions: TransactionsDep, name: str, number: Number) -> Version:
    """Return one version."""
    async with transactions.read() as reader:
        versions = await reader.versions(name, number)
    if not versions:
        raise names.unknown_version(name, number)
    return versions[0]


@router.patch("/{name}/versions/{number}")
async def describe_version(versions: VersionsDep, name: str, number: Number, body: VersionPatch) -> Version:
    """Replace a version's metadata, or add the signature that it lacks."""
    return await versions.describe(name, number, body.metadata, body.signature)


@router.delete("/{name}/versions/{number}", status_code=204)
async def delete_version(versions: VersionsDep, name: str, number: Number) -> None:
    """Delete a version. If Deployments run it, return 409 with their names."""
    await versions.delete_version(name, number)


async def _versions(transactions: Transactions, name: str | None) -> list[Version]:
    async with transactions.read() as reader:
        versions = await reader.versions(name)
    if name is not None and not versions:
        raise names.unknown("model", name)
    return versions


async def _models(transactions: Transactions, name: str | None) -> list[ModelInfo]:
    all_versions = await _versions(transactions, name)
    async with transactions.read() as reader:
        created = await reader.model_created()
    by_model: dict[str, list[Version]] = {}
    for version in all_versions:
        by_model.setdefault(version.model, []).append(version)
    return [
        ModelInfo(
            name=model,
            created_at=created[model],
            versions=[version.number for version in versions],
            latest=versions[-1],
        )
        for model, versions in by_model.items()
    ]
