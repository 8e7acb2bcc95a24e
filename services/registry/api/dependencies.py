"""Dependencies of routes: the application objects, and the headers ``If-Match`` and ``ETag``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request, Response
from fastapi.params import Depends as DependsParameter
from pydantic import BaseModel

from services.registry.application.artifacts import Artifacts
from services.registry.application.baselines import Baselines
from services.registry.application.cards import Cards
from services.registry.application.deletion import Deletion
from services.registry.application.keyring import Keyring
from services.registry.application.retention import Retention
from services.registry.application.signatures import Signatures
from services.registry.application.stages import Stages
from services.registry.application.transactions import Transactions, expected
from services.registry.application.uploads import Uploads
from services.registry.application.verifications import Verifications
from services.registry.application.versions import Versions
from services.registry.domain.preconditions import Kind, content_etag, precondition, version_etag
from tidegate.kernel.protocol.models import Deployment, Endpoint, Version

T = TypeVar("T", Deployment, Endpoint)
V = TypeVar("V", bound=Version)
B = TypeVar("B", bound=BaseModel)


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


def guarded(kind: Kind) -> DependsParameter:
    """Return a dependency for routes that change one object.

    The dependency reads the headers ``If-Match`` and ``If-None-Match``. The first write transaction of the
    request checks that the object meets their conditions.
    """

    async def read(
        request: Request,
        match: Annotated[
            str | None,
            Header(alias="If-Match", description="ETags, one of which the object must have. `*`: any."),
        ] = None,
        none_match: Annotated[
            str | None, Header(alias="If-None-Match", description="`*`: the object must not exist yet.")
        ] = None,
    ) -> AsyncIterator[None]:
        name = "/".join(list(request.path_params.values())[:2])
        mark = expected.set(precondition(kind, name, match, none_match))
        try:
            yield
        finally:
            expected.reset(mark)

    found: DependsParameter = Depends(read)
    return found


def with_etag(stored: T, response: Response) -> T:
    """Set the header ``ETag`` to an object's revision, and return the object."""
    set_etag(response, str(stored.revision))
    return stored


def with_version_etag(version: V, response: Response) -> V:
    """Set the header ``ETag`` to a digest of a version's metadata and signature. Return the version."""
    set_etag(response, version_etag(version))
    return version


def with_content_etag(found: B, response: Response, content: Any = None) -> B:
    """Set the header ``ETag`` to a digest of ``content``, and return ``found``.

    ``content`` None: use ``found`` itself.
    """
    set_etag(response, content_etag(content if content is not None else found.model_dump(mode="json")))
    return found


def set_etag(response: Response, etag: str) -> None:
    """Set the header ``ETag``."""
    response.headers["ETag"] = f'"{etag}"'


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
