"""Models and their versions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response

from services.registry.api.bodies import (
    Items,
    ModelInfo,
    NewVersion,
    Registered,
    VersionCheck,
    VersionChecked,
    VersionPatch,
    registrar,
)
from services.registry.application.registrar import Registrar, Registration
from services.registry.domain.desired_state import ChangeNotification
from services.registry.domain.rollover import DeployRequest
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.models import Version
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=JsonRoute)

Core = Annotated[Registrar, Depends(registrar)]
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


@router.post("/{name}/versions", status_code=201)
async def register(core: Core, name: str, body: NewVersion, response: Response) -> Registered:
    """Register an uploaded artifact as the model's next version.

    200 with the version that has this artifact, format, signature and requirements already, whichever it
    is, so repeating a call is safe. 409 ``breaking_change`` for a signature that breaks callers of the
    latest version, unless ``breaking``.
    """
    found = await core.register(Registration(model=name, **dict(body)))
    response.status_code = 201 if found.new else 200
    return Registered(**dict(found.version), warnings=found.warnings)


@router.post("/{name}/check")
async def check(core: Core, name: str, body: VersionCheck) -> VersionChecked:
    """Check a registration and a deploy before the upload, with their errors; nothing is changed."""
    given = dict(body)
    order = DeployRequest(name, None, given.pop("deployment"), given.pop("endpoint"))
    size, artifact = given.pop("size"), given.pop("artifact") or ""
    found = await core.check(Registration(model=name, artifact=artifact, **given), size, order)
    return VersionChecked(
        format=found.format, stored=found.stored, version=found.version, warnings=found.warnings
    )


@router.get("")
async def list_models(core: Core) -> Items[ModelInfo]:
    """Return every model with its latest version."""
    return Items(items=await _models(core, None))


@router.get("/{name}")
async def get_model(core: Core, name: str) -> ModelInfo:
    """Return one model with its latest version."""
    return (await _models(core, name))[0]


@router.delete("/{name}")
async def delete_model(
    core: Core,
    name: str,
    cascade: Annotated[bool, Query(description="Delete what serves the model, too.")] = False,
) -> Items[ChangeNotification]:
    """Delete a model with all its versions; 409 with its Deployments if it is in use, unless ``cascade``.

    Version numbers are not given again, not even to a new model of the same name.
    """
    return Items(items=await core.delete_model(name, cascade=cascade))


@router.get("/{name}/versions")
async def list_versions(core: Core, name: str) -> Items[Version]:
    """Return the versions of a model, oldest first."""
    return Items(items=await _versions(core, name))


@router.get("/{name}/versions/{number}")
async def get_version(core: Core, name: str, number: Number) -> Version:
    """Return one version."""
    async with core.database.read() as reader:
        found = await reader.versions(name, number)
    if not found:
        raise NotFound(f"Model {name[:80]!r} has no version {number}.")
    return found[0]


@router.patch("/{name}/versions/{number}")
async def describe_version(core: Core, name: str, number: Number, body: VersionPatch) -> Version:
    """Replace a version's metadata, or give it the signature that it lacks."""
    return await core.describe(name, number, body.metadata, body.signature)


@router.delete("/{name}/versions/{number}", status_code=204)
async def delete_version(core: Core, name: str, number: Number) -> None:
    """Delete a version; 409 with the Deployments that run it, if there are any."""
    await core.delete_version(name, number)


async def _versions(core: Registrar, name: str | None) -> list[Version]:
    async with core.database.read() as reader:
        found = await reader.versions(name)
    if name is not None and not found:
        raise NotFound(f"There is no model {name[:80]!r}.")
    return found


async def _models(core: Registrar, name: str | None) -> list[ModelInfo]:
    found = await _versions(core, name)
    async with core.database.read() as reader:
        created = await reader.model_created()
    by_model: dict[str, list[Version]] = {}
    for version in found:
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
