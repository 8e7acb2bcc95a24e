"""API keys: their scopes, limits and changes. Only a digest of the secret is stored."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from services.registry.domain import merge
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.caller_limits import CallerLimits, TokenLimits
from tidegate.kernel.protocol.models import Name

SECRET_BYTES = 32
ID_BYTES = 6

KeyName = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f\x7f]{1,63}$")]
Scope = Literal["infer", "publish", "operate", "admin"]


class KeySpec(CallerLimits):
    """Scopes and limits of a key. A limit applies to all gateway processes together. None means no limit."""

    name: KeyName
    owner: KeyName | None = Field(
        None, description="Person that holds the key. All approvals by keys of one owner count as one."
    )
    scopes: list[Scope] = Field(["infer"], min_length=1)
    endpoints: list[Name] | None = Field(None, min_length=1, max_length=1_000)
    expires_at: AwareDatetime | None = None
    max_versions: int | None = Field(
        None, ge=0, le=10**9, description="Maximum number of versions that the key may register and keep."
    )
    max_artifact_bytes: int | None = Field(
        None,
        ge=0,
        le=10**18,
        description="Maximum number of bytes of all artifacts that the key may register and keep.",
    )
    endpoint_tokens: dict[Name, TokenLimits] = Field(
        default_factory=dict,
        max_length=1_000,
        description="Token limits at single endpoints, in addition to those of the key.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.scopes = sorted(set(self.scopes), key=access.SCOPES.index)
        if self.endpoints is not None:
            self.endpoints = sorted(set(self.endpoints))
        return self


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A stored key. After a rotation, the secret with ``previous_digest`` works until ``previous_until``."""

    id: str
    spec: KeySpec
    digest: str
    created_at: datetime
    previous_digest: str | None = None
    previous_until: datetime | None = None
    revoked_at: datetime | None = None
    revision: int = 0

    def state(self, now: datetime) -> str:
        """Return ``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.spec.expires_at is not None and self.spec.expires_at <= now else "active"

    def for_gateways(self) -> access.Key:
        """Return the key in the form that gateways use."""
        spec = self.spec
        endpoints = None if spec.endpoints is None else frozenset(spec.endpoints)
        return access.Key(
            principal=access.Principal(self.id, spec.name, frozenset(spec.scopes), endpoints, spec.weight),
            digest=self.digest,
            expires_ms=_ms(spec.expires_at),
            allowance=spec.allowance(),
            previous=self.previous_digest,
            previous_until_ms=_ms(self.previous_until) or 0.0,
            tokens=spec.token_allowance(),
            endpoint_tokens={name: each.token_allowance() for name, each in spec.endpoint_tokens.items()},
        )


def _ms(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp() * 1e3


def parse_spec(fields: Mapping[str, Any], now: datetime) -> KeySpec:
    """Check and return a key's spec. ``fields`` may have ``ttl_s`` (seconds) instead of ``expires_at``.

    Raise BadRequest for invalid fields.
    """
    values = dict(fields)
    ttl_s = values.pop("ttl_s", None)
    if ttl_s is not None:
        if values.get("expires_at") is not None:
            raise BadRequest("Give either ttl_s or expires_at, not both.")
        values["expires_at"] = _after(now, ttl_s)
    spec = merge.checked(KeySpec, values, "key")
    if spec.expires_at is not None and spec.expires_at <= now:
        raise BadRequest("expires_at is in the past. A new key must expire in the future.")
    return spec


def _after(now: datetime, ttl_s: Any) -> datetime:
    try:
        return now + timedelta(seconds=ttl_s)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"key: ttl_s must be a number of seconds, not {str(ttl_s)[:80]!r}.") from None


def created(spec: KeySpec, random: bytes, now: datetime) -> tuple[StoredKey, str]:
    """Return a new key and its secret. ``random``: ID_BYTES + SECRET_BYTES random bytes."""
    id_ = random[:ID_BYTES].hex()
    key = _key(id_, random[ID_BYTES:])
    return StoredKey(id_, spec, access.digest_of(key.encode()), now), key


def rotated(stored: StoredKey, random: bytes, now: datetime, grace_s: float) -> tuple[StoredKey, str]:
    """Return the key with a new secret, and the new secret itself.

    The old secret works for ``grace_s`` more seconds, but not after the key has expired. Raise Conflict for a
    revoked key.
    """
    _check_not_revoked(stored)
    key = _key(stored.id, random)
    until = now + timedelta(seconds=grace_s)
    if stored.spec.expires_at is not None:
        until = min(until, stored.spec.expires_at)
    return (
        replace(
            stored,
            digest=access.digest_of(key.encode()),
            previous_digest=stored.digest if grace_s else None,
            previous_until=until if grace_s else None,
        ),
        key,
    )


def changed(stored: StoredKey, patch: Mapping[str, Any], now: datetime) -> StoredKey:
    """Return the key after a JSON merge patch.

    Raise BadRequest if the patched fields are invalid. Raise Conflict if the key is revoked.
    """
    _check_not_revoked(stored)
    fields = merge.patched(stored.spec.model_dump(exclude_none=True), patch)
    if "ttl_s" in fields or "expires_at" in patch:
        if "expires_at" not in patch:
            fields.pop("expires_at", None)
        return replace(stored, spec=parse_spec(fields, now))
    # Do not check the expiry time, so that an expired key can be renamed, for example. The key stays expired.
    return replace(stored, spec=merge.checked(KeySpec, fields, "key"))


def revoked(stored: StoredKey, now: datetime) -> StoredKey:
    """Return the key as revoked. If it is revoked already, return it unchanged."""
    if stored.revoked_at is not None:
        return stored
    return replace(stored, revoked_at=now, previous_digest=None, previous_until=None)


def _check_not_revoked(stored: StoredKey) -> None:
    if stored.revoked_at is not None:
        raise Conflict(
            f"Key {stored.id} is revoked and can no longer change. Create a new key: `tidegate keys create`."
        )


def _key(id_: str, secret: bytes) -> str:
    return access.key_of(id_, base64.urlsafe_b64encode(secret).rstrip(b"=").decode())
