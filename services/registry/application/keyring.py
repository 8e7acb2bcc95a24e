"""Create, change, rotate and revoke API keys. Each change is one transaction with an audit entry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.registry.adapters.sql import keys
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.application.transactions import Transactions
from services.registry.domain.desired_state import Action, ChangeNotification
from services.registry.domain.keys import (
    ID_BYTES,
    SECRET_BYTES,
    StoredKey,
    changed,
    created,
    parse_spec,
    revoked,
    rotated,
)
from tidegate.kernel.errors import NotFound


class Keyring:
    """Create, read, change, rotate and revoke API keys, for the routes of ``/v1/keys``."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    async def create(self, fields: Mapping[str, Any]) -> tuple[StoredKey, str]:
        """Create a key. Return the key and its secret. Only a digest of the secret is stored.

        Raise BadRequest for invalid fields.
        """
        async with self._transactions.change() as writer:
            spec = parse_spec(fields, writer.now)
            key, secret_key = created(spec, os.urandom(ID_BYTES + SECRET_BYTES), writer.now)
            return await _put(writer, key, None), secret_key

    async def change(self, id_: str, patch: Mapping[str, Any]) -> StoredKey:
        """Change fields of a key.

        Raise NotFound for an unknown key, Conflict for a revoked key, or BadRequest for invalid fields.
        """
        async with self._transactions.change() as writer:
            before = await _read(writer, id_)
            return await _put(writer, changed(before, patch, writer.now), before)

    async def rotate(self, id_: str, grace_s: float) -> tuple[StoredKey, str]:
        """Replace a key's secret. The old secret works for ``grace_s`` more seconds.

        Raise NotFound for an unknown key, or Conflict for a revoked key.
        """
        async with self._transactions.change() as writer:
            before = await _read(writer, id_)
            key, secret_key = rotated(before, os.urandom(SECRET_BYTES), writer.now, grace_s)
            return await _put(writer, key, before), secret_key

    async def revoke(self, id_: str) -> StoredKey:
        """Revoke a key. If it is revoked already, do nothing. Raise NotFound for an unknown key."""
        async with self._transactions.change() as writer:
            before = await _read(writer, id_)
            key = revoked(before, writer.now)
            return before if key == before else await _put(writer, key, before)

    async def get(self, id_: str) -> StoredKey:
        """Return one key. Raise NotFound for an unknown key."""
        async with self._transactions.read() as reader:
            matches = await keys.read(reader.connection, id_)
        if not matches:
            raise _no_key(id_)
        return matches[0]

    async def all(self) -> list[StoredKey]:
        """Return every key, oldest first, including revoked ones."""
        async with self._transactions.read() as reader:
            return await keys.read(reader.connection)

    async def for_gateways(self, known: str) -> tuple[str, list[StoredKey] | None]:
        """Return the revision of the keys, and the keys that are not revoked.

        Return None instead of the keys if ``known`` is the current revision.
        """
        async with self._transactions.read() as reader:
            mark = str(await keys.revision(reader.connection))
            return mark, None if mark == known else await keys.not_revoked(reader.connection)


async def _read(writer: DesiredStateWriter, id_: str) -> StoredKey:
    matches = await keys.read(writer.connection, id_)
    if not matches:
        raise _no_key(id_)
    return matches[0]


async def _put(writer: DesiredStateWriter, key: StoredKey, before: StoredKey | None) -> StoredKey:
    stored = replace(key, revision=writer.next_revision)
    await keys.put(writer.connection, stored, writer.next_revision, created=before is None)
    action: Action = "created" if before is None else "deleted" if key.revoked_at else "updated"
    was = None if before is None else _for_audit(before)
    await writer.note(ChangeNotification("key", key.id, action), was, _for_audit(key))
    return stored


def _for_audit(key: StoredKey) -> dict[str, Any]:
    """Return a key's fields for the audit log.

    The field ``secret`` has the first 8 characters of the secret's digest. It only shows whether the secret
    has changed.
    """
    return {
        **key.spec.model_dump(mode="json"),
        "secret": key.digest[:8],
        "previous_until": key.previous_until and key.previous_until.isoformat(),
        "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
    }


def _no_key(id_: str) -> NotFound:
    return NotFound(f"There is no key {id_[:40]!r}. `tidegate keys --all` lists every key.")
