"""Bodies of requests and responses that are not in :mod:`tidegate.kernel.protocol.models`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field, WithJsonSchema

from services.registry.domain.edits import POLICY_FIELDS, ApplyOutcome
from services.registry.domain.stated_models import StatedModel
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
from tidegate.kernel.protocol.verification import VerificationOptions
from tidegate.kernel.service.openapi import inlined

T = TypeVar("T")
Trust = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=200)]


def _schema(model: type[BaseModel], required: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON schema of a pydantic class, with all definitions inlined.

    ``required``: the names that replace the schema's own list of required fields.
    """
    schema = inlined(model)
    return {**schema, "required": list(required)} if required else {**schema, "required": []}


# These types are dicts and not pydantic classes, because an absent field and null have different meanings.
# The domain checks the fields.
DeploymentFields = Annotated[dict[str, Any], WithJsonSchema(_schema(DeploymentSpec, ("model", "version")))]
DeploymentPatch = Annotated[dict[str, Any], WithJsonSchema(_schema(DeploymentSpec, ()))]
_SPEC = _schema(DeploymentSpec, ())
_POLICY = _SPEC | {"properties": {name: _SPEC["properties"][name] for name in POLICY_FIELDS}}
PolicyPatch = Annotated[dict[str, Any], WithJsonSchema(_POLICY)]
ModelFields = Annotated[dict[str, Any], WithJsonSchema(_schema(StatedModel, ("name",)))]
EndpointFields = Annotated[dict[str, Any], WithJsonSchema(_schema(EndpointSpec, ("targets",)))]


class Items(BaseModel, Generic[T]):
    """A list of objects."""

    items: list[T]


class Page(BaseModel, Generic[T]):
    """A page of a list. ``next``: the ``cursor`` of the next page; None on the last page."""

    items: list[T]
    next: str | None = None


class ArtifactInfo(BaseModel):
    """A stored artifact."""

    sha256: Digest
    size: int = Field(description="Bytes.")


class NewVersion(Noun):
    """A version to register, from an uploaded artifact."""

    artifact: Digest = Field(description="sha256 of the artifact.")
    filename: str = Field(description="Name of the model's file, without folders.")
    format: Format | None = None
    signature: Signature | None = Field(
        None, description="Inputs and outputs. Not needed for files that declare them, such as ONNX."
    )
    requirements: list[str] | None = Field(
        None,
        max_length=2_000,
        description="Lines of a requirements.txt; None: use the requirements in the artifact.",
    )
    metadata: VersionMetadata | None = None
    allow_pickle: bool = Field(False, description="Accept a pickle. Loading it can run code on the workers.")
    trust: Trust = Field(
        default_factory=list,
        description="Names that a pickle or skops file may import, although they can be dangerous.",
    )
    breaking: bool = Field(False, description="Accept a signature that breaks callers of the latest version.")
    verification: VerificationOptions | None = Field(
        None,
        description="Options of the scratch replica's Deployment, and samples that the version must answer.",
    )


class VersionInfo(Version):
    """A version with its aliases and its stage. ``deleted_at`` None: it is not deleted."""

    aliases: list[str] = Field(default_factory=list)
    stage: str | None = None
    deleted_at: datetime | None = None


class Restored(BaseModel):
    """The numbers of the versions that were restored."""

    versions: list[int]


class Registered(Version):
    """A registered version. ``warnings``: sentences for the user."""

    warnings: list[str] = Field(default_factory=list)


class VersionCheck(Noun):
    """A version to check before its registration. Its artifact need not be uploaded yet."""

    artifact: Digest | None = Field(
        None, description="sha256. If the artifact is stored, the registry also checks its bytes."
    )
    size: int | None = Field(None, ge=0, description="Bytes.")
    filename: str = Field(description="Name of the model's file, without folders.")
    format: Format | None = None
    signature: Signature | None = None
    requirements: list[str] | None = Field(None, max_length=2_000)
    metadata: VersionMetadata | None = None
    allow_pickle: bool = False
    trust: Trust = Field(default_factory=list)
    breaking: bool = False
    deployment: DeploymentPatch = Field(default_factory=dict, description="Options of the Deployment.")
    endpoint: Name | None = Field(None, description="Name of the Endpoint; None: the name of the model.")


class VersionChecked(BaseModel):
    """The result of a check that found no error.

    ``version``: a registered version that is identical; None if there is none.
    """

    format: Format | None = Field(description="None: the format is only known after the upload.")
    stored: bool = Field(description="True if the artifact is already stored, so no upload is needed.")
    version: Version | None = None
    warnings: list[str] = Field(default_factory=list)


class VersionPatch(Noun):
    """Changes to a registered version. A signature can be added only if the version has none."""

    metadata: VersionMetadata | None = Field(
        None, description="The new metadata. They replace all present metadata."
    )
    metadata_patch: dict[str, Any] | None = Field(
        None, description="A JSON merge patch (RFC 7396) of the metadata: null removes a value."
    )
    signature: Signature | None = None


class ModelCard(Noun):
    """A model card: a Markdown text about a version."""

    text: str


class ModelInfo(BaseModel):
    """A model and its versions."""

    name: Name
    created_at: Any
    versions: list[int] = Field(description="Version numbers, ascending.")
    aliases: dict[str, int] = Field(default_factory=dict, description="Each alias with its version.")
    latest: Version


class OverrideBody(Noun):
    """An override: the number of replicas that an operator sets.

    The host's capacity always limits the number. The Deployment's maximum limits it only if ``force`` is
    False.
    """

    replicas: int = Field(ge=0, le=10_000)
    force: bool = Field(
        False, description="Allow more than the Deployment's maximum. The host's capacity still applies."
    )
    ttl_s: float | None = Field(
        None, gt=0, le=366 * 86_400, description="Duration in seconds; None: until the override is removed."
    )


class SettleBody(Noun):
    """The request to end a roll-over: the move of an Endpoint's traffic to new targets.

    ``revision``: the revision that the Endpoint must have; None means any revision.
    """

    revision: int | None = None


class DeployBody(Noun):
    """A version to serve. ``deployment``: options that differ from those of the replaced Deployment."""

    model: Name
    version: Annotated[int, Field(ge=1)] | str | None = Field(
        None, description="Number or alias of the version; None: the latest version."
    )
    deployment: DeploymentPatch = Field(default_factory=dict)
    endpoint: Name | None = Field(None, description="Name of the Endpoint; None: the name of the model.")
    traffic: bool = Field(
        True, description="False: create only the Deployment, and do not change the Endpoint."
    )


class Deployed(BaseModel):
    """The Deployment and the Endpoint of the deployed version.

    ``endpoint`` may be None if the request had ``traffic`` False.
    """

    deployment: Deployment
    endpoint: Endpoint | None


class ApplyBody(Noun):
    """The Deployments, Endpoints and models in a file of ``tidegate apply``.

    ``prune``: delete the Endpoints that the file does not name, and the Deployments that neither the file nor
    a remaining Endpoint names. ``deletions``: the only objects that ``prune`` may delete, such as
    ``endpoint fraud``; None: it may delete any object.
    """

    deployments: list[DeploymentFields] = Field(default_factory=list, max_length=1_000)
    endpoints: list[EndpointFields] = Field(default_factory=list, max_length=1_000)
    models: list[ModelFields] = Field(default_factory=list, max_length=1_000)
    prune: bool = False
    deletions: list[str] | None = Field(None, max_length=100_000)


class Applied(BaseModel):
    """The outcome for each object in a file of ``tidegate apply``.

    ``revision``: the revision after all changes. In a dry run: the revision that the changes would have led
    to. ``items`` begin with the objects of the file. With ``prune``, the objects that the file does not name
    follow. At the end are objects that changed with them, for example a Deployment that goes to sleep because
    its endpoint has a new target.
    """

    revision: int
    items: list[ApplyOutcome]
