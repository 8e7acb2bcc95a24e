"""The table of API keys that a gateway checks credentials against."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import Key

FOREVER = float("inf")


class KeyTable:
    """All keys that are not revoked. ``mark`` identifies the version of the registry's table."""

    def __init__(self, mark: str, keys: Mapping[str, Key]) -> None:
        self.mark = mark
        self.keys = keys

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> KeyTable:
        """Parse the registry's document. Raise KeyError, TypeError or ValueError if it is malformed."""
        keys = [Key.from_dict(fields) for fields in document["keys"]]
        return cls(str(document["mark"]), {key.principal.id: key for key in keys})

    def find(self, credential: bytes, now_ms: float) -> tuple[Key, float] | None:
        """Return a credential's key, and when the credential becomes invalid (ms since the epoch).

        Return None if the credential is not valid. A credential with the key's previous secret may become
        invalid before the key expires.
        """
        id_ = access.key_id(credential)
        key = self.keys.get(id_) if id_ is not None else None
        if key is None:
            return None
        until = FOREVER if key.expires_ms is None else key.expires_ms
        digest = access.digest_of(credential)
        if not hmac.compare_digest(digest, key.digest):
            if key.previous is None or not hmac.compare_digest(digest, key.previous):
                return None
            until = min(until, key.previous_until_ms)
        return (key, until) if now_ms < until else None
