"""Store, list and delete the cryptographic signatures of artifacts. Each change is in the audit log."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from services.registry.adapters.sql import signatures
from services.registry.adapters.sql.signatures import StoredSignature
from services.registry.application.artifacts import Artifacts
from services.registry.application.transactions import Transactions
from services.registry.domain.desired_state import ChangeNotification
from tidegate.kernel import signing
from tidegate.kernel.errors import BadRequest, NotFound, Unavailable
from tidegate.kernel.protocol.model_signature import read_bundle
from tidegate.kernel.signing import BadKey, BadSignature, TrustedKeys

# The maximum number of cryptographic signatures of an artifact. Usually only its publisher and its reviewer
# sign.
MOST = 16


class Signatures:
    """Read, store and delete the cryptographic signatures of artifacts.

    ``trusted``: a PEM file or a folder with the trusted public keys. None means that any key is trusted.
    """

    def __init__(self, transactions: Transactions, artifacts: Artifacts, trusted: Path | None) -> None:
        self._transactions = transactions
        self._artifacts = artifacts
        self._trusted = trusted

    async def of_artifact(self, sha256: str) -> list[StoredSignature]:
        """Return the cryptographic signatures of an artifact, oldest first.

        Raise NotFound for an unknown artifact.
        """
        await self._artifacts.size(sha256)
        async with self._transactions.read() as reader:
            return await signatures.find(reader.connection, sha256)

    async def put(self, sha256: str, bundle: dict[str, Any]) -> StoredSignature:
        """Store a signature. It replaces an earlier signature by the same key.

        Raise BadRequest if the signature is for other files. If trusted keys are configured, raise BadRequest
        for a signature by another key. Raise NotFound for an unknown artifact.
        """
        await self._artifacts.size(sha256)
        signature = read_bundle(bundle)
        if self._trusted is not None and not (await self._keys(self._trusted)).trusts(signature):
            raise BadRequest(
                f"The key {signature.key[:12]} is not trusted, or its signature is wrong. Sign with a key "
                "of TIDEGATE_TRUSTED_KEYS, or let an operator add your public key there.",
                reason="bad_signature",
            )
        async with self._artifacts.store.local(sha256) as path:
            try:
                problem = await asyncio.to_thread(signing.mismatch, signature.files, path, sha256)
            except BadSignature as error:
                problem = str(error)
        if problem:
            raise BadRequest(
                f"The signature does not belong to this artifact: {problem}. Sign the file that you deploy.",
                reason="bad_signature",
            )
        async with self._transactions.change() as writer:
            stored = StoredSignature(signature.key, bundle, writer.now)
            held = await signatures.find(writer.connection, sha256)
            if len(held) >= MOST and stored.key not in {each.key for each in held}:
                raise BadRequest(f"The artifact has {MOST} signatures already: delete one of them first.")
            await signatures.put(writer.connection, sha256, stored)
            await writer.note(_changed(sha256), None, {"signed_by": stored.key})
        return stored

    async def delete(self, sha256: str, key: str) -> None:
        """Delete the signature that ``key`` made. Raise NotFound if the artifact has no such signature."""
        async with self._transactions.change() as writer:
            if not await signatures.drop(writer.connection, sha256, key):
                raise NotFound(f"The artifact {sha256[:12]} has no signature by the key {key[:12]!r}.")
            await writer.note(_changed(sha256), {"signed_by": key}, None)

    async def _keys(self, trusted: Path) -> TrustedKeys:
        try:
            return await asyncio.to_thread(TrustedKeys.read, trusted)
        except BadKey as error:
            raise Unavailable(f"The registry cannot read TIDEGATE_TRUSTED_KEYS: {error}.") from None


def _changed(sha256: str) -> ChangeNotification:
    return ChangeNotification("artifact", sha256, "updated")
