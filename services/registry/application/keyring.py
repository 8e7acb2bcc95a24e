"""API keys: made, changed, rotated, revoked in one transaction each, audited, and told to the gateways."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.registry.adapters.sql import keys
from services.registry.adapters.sql.writing import DesiredStateWriter
from services.registry.application.registrar import Registrar
from services.registry.domain.desired_state import Action, ChangeNotification
from services.registry.domain.keys import (
    ID_BYTES,
    SECRET_BYTES,
    StoredKey,
    changed,
    made,
    revoked,
    rotated,
    spec_of,
)
from tidegate.kernel.errors import NotFound


class Keyring:
    """The core behind ``/v1/keys``."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar

    async def make(self, fields: Mapping[str, Any]) -> tuple[StoredKey, str]:
        """A new key, and the key itself, of which only a digest is kept. Raises BadRequest."""
        async with self._registrar.change() as writer:
            key, shown = made(spec_of(fields, writer.now), os.urandom(ID_BYTES + SECRET_BYTES), writer.now)
            return await _put(writer, key, None), shown

    async def change(self, id_: str, patch: Mapping[str, Any]) -> StoredKey:
        """Change fields of a key. Raises NotFound, BadRequest, or Conflict for a revoked one."""
        async with self._registrar.change() as writer:
            held = await _held(writer, id_)
            return await _put(writer, changed(held, patch, writer.now), held)

    async def rotate(self, id_: str, grace_s: float) -> tuple[StoredKey, str]:
        """Another secret for a key; the old one is good for ``grace_s`` more. Raises NotFound, Conflict."""
        async with self._registrar.change() as writer:
            held = await _held(writer, id_)
            key, shown = rotated(held, os.urandom(SECRET_BYTES), writer.now, grace_s)
            return await _put(writer, key, held), shown

    async def revoke(self, id_: str) -> StoredKey:
        """A key is good no longer; no error when it is so already. Raises NotFound."""
        async with self._registrar.change() as writer:
            held = await _held(writer, id_)
            key = revoked(held, writer.now)
            return held if key == held else await _put(writer, key, held)

    async def get(self, id_: str) -> StoredKey:
        """One key; raises NotFound."""
        async with self._registrar.database.read() as reader:
            found = await keys.held(reader.connection, id_)
        if not found:
            raise _no_key(id_)
        return found[0]

    async def all(self) -> list[StoredKey]:
        """Every key, oldest first, revoked ones too."""
        async with self._registrar.database.read() as reader:
            return await keys.held(reader.connection)

    async def for_gateways(self, known: str) -> tuple[str, list[StoredKey] | None]:
        """A mark of the keys' state and the keys that are not revoked; None when ``known`` is that mark."""
        async with self._registrar.database.read() as reader:
            mark = str(await keys.revision(reader.connection))
            return mark, None if mark == known else await keys.good(reader.connection)


async def _held(writer: DesiredStateWriter, id_: str) -> StoredKey:
    found = await keys.held(writer.connection, id_)
    if not found:
        raise _no_key(id_)
    return found[0]


async def _put(writer: DesiredStateWriter, key: StoredKey, before: StoredKey | None) -> StoredKey:
    stored = replace(key, revision=writer.next_revision)
    await keys.put(writer.connection, stored, writer.next_revision, created=before is None)
    action: Action = "created" if before is None else "deleted" if key.revoked_at else "updated"
    was = None if before is None else _shown(before)
    await writer.note(ChangeNotification("key", key.id, action), was, _shown(key))
    return stored


def _shown(key: StoredKey) -> dict[str, Any]:
    """For the audit log: all but the digests. That the secret is another one shows as another mark."""
    return {
        **key.spec.model_dump(mode="json"),
        "secret": key.digest[:8],
        "previous_until": key.previous_until and key.previous_until.isoformat(),
        "revoked_at": key.revoked_at and key.revoked_at.isoformat(),
    }


def _no_key(id_: str) -> NotFound:
    return NotFound(f"There is no key {id_[:40]!r}.")
