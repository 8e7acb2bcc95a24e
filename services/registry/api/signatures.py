"""Routes of the cryptographic signatures of artifacts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from services.registry.adapters.sql.signatures import StoredSignature
from services.registry.api.bodies import Items
from services.registry.api.dependencies import SignaturesDep
from services.registry.api.replicas import own_artifact
from tidegate.kernel.protocol.models import Digest
from tidegate.kernel.service.api import JsonRoute

_PREFIX = "/v1/artifacts/{sha256}/signatures"
router = APIRouter(prefix=_PREFIX, tags=["artifacts"], route_class=JsonRoute)
# Replicas also use this router, to check the signatures of their own artifact.
reading = APIRouter(
    prefix=_PREFIX, tags=["artifacts"], route_class=JsonRoute, dependencies=[Depends(own_artifact)]
)


class ArtifactSignature(BaseModel):
    """A cryptographic signature of an artifact."""

    key: Digest = Field(description="sha256 of the public key (PEM, SubjectPublicKeyInfo).")
    created_at: datetime
    bundle: dict[str, Any] = Field(description="The signature, as a bundle of OpenSSF Model Signing.")


@reading.get("")
async def get_signatures(signatures: SignaturesDep, sha256: Digest) -> Items[ArtifactSignature]:
    """Return the signatures of an artifact, oldest first."""
    return Items(items=[_shown(each) for each in await signatures.of_artifact(sha256)])


@router.post("", status_code=201)
async def add_signature(signatures: SignaturesDep, sha256: Digest, body: dict[str, Any]) -> ArtifactSignature:
    """Store a bundle of OpenSSF Model Signing, as `model_signing sign key` writes it.

    The bundle replaces an earlier signature that was made with the same key. If the registry has trusted
    keys, the signature must be made with one of them.
    """
    return _shown(await signatures.put(sha256, body))


@router.delete("/{key}", status_code=204)
async def delete_signature(signatures: SignaturesDep, sha256: Digest, key: Digest) -> None:
    """Delete the signature that was made with a key."""
    await signatures.delete(sha256, key)


def _shown(stored: StoredSignature) -> ArtifactSignature:
    return ArtifactSignature(key=stored.key, created_at=stored.created_at, bundle=stored.bundle)
