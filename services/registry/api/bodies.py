"""What comes in and goes out over HTTP, beside the nouns themselves."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar

from fastapi import Header, Request
from pydantic import BaseModel, Field, WithJsonSchema

from services.registry.application.registrar import Registrar
from services.registry.domain.edits import POLICY_FIELDS, ApplyOutcome
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import (
    Deployment,
    DeploymentSpec,
    Digest,
    Endpoint,
    EndpointSpec,
    Format,
    Name,
    Noun,
    Signature,
    Version,
    VersionMetadata,
)
from tidegate.kernel.service.openapi import inlined

T = TypeVar("T")

LONGEST_REVISION = 18  # digits: what the database counts with


def _schema(model: type[BaseModel], required: tuple[str, ...]) -> dict[str, Any]:
    """A model's JSON schema with other required fields and its definitions written out in place."""
    schema = inlined(model)
    return {**schema, "required": list(required)} if required else {**schema, "required": []}


# Read as plain fields, because what was left out matters; checked against the noun by the domain.
DeploymentFields = Annotated[dict[str, Any], WithJsonSchema(_schema(DeploymentSpec, ("model", "version")))]
DeploymentPatch = Annotated[dict[str, Any], WithJsonSchema(_schema(DeploymentSpec, ()))]
_SPEC = _schema(DeploymentSpec, ())
_POLICY = _SPEC | {"properties": {name: _SPEC["properties"][name] for name in POLICY_FIELDS}}
PolicyPatch = Annotated[dict[str, Any], WithJsonSchema(_POLICY)]
EndpointFields = Annotated[dict[str, Any], WithJsonSchema(_schema(EndpointSpec, ("targets",)))]


class Items(BaseModel, Generic[T]):
    """A list."""

    items: list[T]


class ArtifactInfo(BaseModel):
    """A stored artifact."""

    sha256: Digest
    size: int = Field(description="Bytes.")


class NewVersion(Noun):
    """A version to register, of an artifact that has been uploaded."""

    artifact: Digest = Field(description="sha256 of the artifact.")
    filename: str = Field(description="The file's name; the format is read from its ending if not given.")
    format: Format | None = None
    signature: Signature | None = Field(None, description="Read from an ONNX file or a config.pbtxt itself.")
    requirements: list[str] | None = Field(
        None, max_length=2_000, description="Lines as pip reads them; None: those that the artifact brings."
    )
    metadata: VersionMetadata | None = None
    allow_pickle: bool = Field(False, description="Take a pickle, whose loading runs code on the workers.")
    breaking: bool = Field(False, description="Take a signature that breaks callers of the latest version.")


class Registered(Version):
    """A version as it was registered. ``warnings``: what its publisher should know, each a sentence."""

    warnings: list[str] = Field(default_factory=list)


class VersionCheck(Noun):
    """A version that somebody is about to register and deploy; its artifact need not be uploaded yet."""

    artifact: Digest | None = Field(
        None, description="sha256; with it the bytes are checked, if stored here."
    )
    size: int | None = Field(None, ge=0, description="Bytes.")
    filename: str = Field(description="As for the registration.")
    format: Format | None = None
    signature: Signature | None = None
    requirements: list[str] | None = Field(None, max_length=2_000)
    metadata: VersionMetadata | None = None
    allow_pickle: bool = False
    breaking: bool = False
    deployment: DeploymentPatch = Field(default_factory=dict, description="The options of the deploy.")
    endpoint: Name | None = Field(None, description="None: called like the model.")


class VersionChecked(BaseModel):
    """Nothing was refused. ``version``: the one that has these bytes already."""

    format: Format
    stored: bool = Field(description="The artifact is here: no upload is needed.")
    version: Version | None = None
    warnings: list[str] = Field(default_factory=list)


class VersionPatch(Noun):
    """What can be said of a version later; a signature only where there is none yet."""

    metadata: VersionMetadata | None = None
    signature: Signature | None = None


class ModelInfo(BaseModel):
    """A model: a name with versions."""

    name: Name
    created_at: Any
    versions: list[int] = Field(description="Version numbers, ascending.")
    latest: Version


class OverrideBody(Noun):
    """An operator's word on the number of replicas. The Deployment's maximum bounds it, and the host does."""

    replicas: int = Field(ge=0, le=10_000)
    force: bool = Field(False, description="Go beyond the Deployment's maximum; never beyond the host.")
    ttl_s: float | None = Field(None, gt=0, le=366 * 86_400, description="None: until it is withdrawn.")


class SettleBody(Noun):
    """``revision``: the endpoint as it was seen when a target was found ready."""

    revision: int | None = None


class DeployBody(Noun):
    """A version to serve; ``deployment`` holds the options that differ from those of the version before."""

    model: Name
    version: int | None = Field(None, ge=1, description="None: the latest.")
    deployment: DeploymentPatch = Field(default_factory=dict)
    endpoint: Name | None = Field(None, description="None: called like the model.")
    traffic: bool = Field(
        True, description="False: only the Deployment is made; the Endpoint stays as it is."
    )


class Deployed(BaseModel):
    """What serves the version now. ``endpoint`` None: there is none yet, and none was to be made."""

    deployment: Deployment
    endpoint: Endpoint | None


class ApplyBody(Noun):
    """Deployments and Endpoints as a file declares them."""

    deployments: list[DeploymentFields] = Field(default_factory=list, max_length=1_000)
    endpoints: list[EndpointFields] = Field(default_factory=list, max_length=1_000)


class Applied(BaseModel):
    """What became of each object, and the revision that holds them all."""

    revision: int
    items: list[ApplyOutcome]


def registrar(request: Request) -> Registrar:
    """The core, as the app has wired it."""
    found: Registrar = request.app.state.registrar
    return found


def if_match(
    value: Annotated[
        str | None, Header(alias="If-Match", description="Revision the object must still be at.")
    ] = None,
) -> int | None:
    """The revision in ``If-Match``, with or without quotes."""
    if value is None:
        return None
    bare = value.strip().removeprefix("W/").strip('"')
    if not bare.isdecimal() or len(bare) > LONGEST_REVISION:
        raise BadRequest(f"If-Match must be an object's revision, a number, not {value[:40]!r}.")
    return int(bare)
