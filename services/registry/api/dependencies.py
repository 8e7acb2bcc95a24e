"""Dependencies of routes: the application objects, and the headers ``If-Match`` and ``ETag``."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request, Response

from services.registry.application.artifacts import Artifacts
from services.registry.application.baselines import Baselines
from services.registry.application.cards import Cards
from services.registry.application.deletion import Deletion
from services.registry.application.keyring import Keyring
from services.registry.application.retention import Retention
from services.registry.application.signatures import Signatures
from services.registry.application.stages import Stages
from services.registry.application.transactions import Transactions
from services.registry.application.uploads import Uploads
from services.registry.application.verifications import Verifications
from services.registry.application.versions import Versions
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.models import Deployment, Endpoint

T = TypeVar("T", Deployment, Endpoint)

MAX_REVISION_DIGITS = 18  # the database counts revisions in 64 bits


def _transactions(request: Request) -> Transactions:
    value: Transactions = request.app.state.transactions
    return value


def _artifacts(request: Request) -> Artifacts:
    value: Artifacts = request.app.state.artifacts
    return value


def _uploads(request: Request) -> Uploads:
    value: Uploads = request.app.state.uploads
    return value


def _versions(request: Request) -> Versions:
    value: Versions = request.app.state.versions
    return value


def _baselines(request: Request) -> Baselines:
    value: Baselines = request.app.state.baselines
    return value


def _verifications(request: Request) -> Verifications:
    value: Verifications = request.app.state.verifications
    return value


def _signatures(request: Request) -> Signatures:
    value: Signatures = request.app.state.signatures
    return value


def _cards(request: Request) -> Cards:
    value: Cards = request.app.state.cards
    return value


def _deletion(request: Request) -> Deletion:
    value: Deletion = request.app.state.deletion
    return value


def _retention(request: Request) -> Retention:
    value: Retention = request.app.state.retention
    return value


def _stages(request: Request) -> Stages:
    value: Stages = request.app.state.stages
    return value


def _keyring(request: Request) -> Keyring:
    value: Keyring = request.app.state.keyring
    return value


def _if_match(
    value: Annotated[
        str | None, Header(alias="If-Match", description="Revision that the object must still have.")
    ] = None,
) -> int | None:
    """Return the revision in ``If-Match``, with or without quotes. Raise BadRequest for anything else."""
    if value is None:
        return None
    bare = value.strip().removeprefix("W/").strip('"')
    if not bare.isdecimal() or len(bare) > MAX_REVISION_DIGITS:
        raise BadRequest(
            f"If-Match must be the revision of the object, a number, not {value[:40]!r}. "
            "GET returns it as ETag."
        )
    return int(bare)


def with_etag(stored: T, response: Response) -> T:
    """Set the header ``ETag`` to an object's revision, and return the object."""
    response.headers["ETag"] = f'"{stored.revision}"'
    return stored


TransactionsDep = Annotated[Transactions, Depends(_transactions)]
ArtifactsDep = Annotated[Artifacts, Depends(_artifacts)]
UploadsDep = Annotated[Uploads, Depends(_uploads)]
VersionsDep = Annotated[Versions, Depends(_versions)]
BaselinesDep = Annotated[Baselines, Depends(_baselines)]
SignaturesDep = Annotated[Signatures, Depends(_signatures)]
CardsDep = Annotated[Cards, Depends(_cards)]
VerificationsDep = Annotated[Verifications, Depends(_verifications)]
DeletionDep = Annotated[Deletion, Depends(_deletion)]
RetentionDep = Annotated[Retention, Depends(_retention)]
StagesDep = Annotated[Stages, Depends(_stages)]
KeyringDep = Annotated[Keyring, Depends(_keyring)]
IfMatch = Annotated[int | None, Depends(_if_match)]
