"""API keys: what one may do and use, and the steps of its life. The key itself is never stored."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from services.registry.domain import merge
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.models import Name, Noun

# A bucket that holds less than so much of its rate would lose tokens between two looks at it.
LEAST_BURST_S = 0.05
SECRET_BYTES = 32
ID_BYTES = 6

KeyName = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00-\x1f\x7f]{1,63}$")]
Scope = Literal["infer", "publish", "operate", "admin"]


class KeySpec(Noun):
    """What a key is for. Limits hold over all gateway processes; None: no limit."""

    name: KeyName
    scopes: list[Scope] = Field(["infer"], min_length=1)
    endpoints: list[Name] | None = Field(None, min_length=1, max_length=1_000)
    expires_at: AwareDatetime | None = None
    rate: float | None = Field(None, gt=0, le=1e6, description="Requests per second.")
    burst: int | None = Field(None, ge=1, le=10**7, description="Requests at once; None: those of a second.")
    concurrency: int | None = Field(None, ge=1, le=10**6, description="Requests under way at one time.")
    day: int | None = Field(None, ge=1, le=10**12, description="Requests in a calendar day (UTC).")
    month: int | None = Field(None, ge=1, le=10**12, description="Requests in a calendar month (UTC).")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.scopes = sorted(set(self.scopes), key=access.SCOPES.index)
        if self.endpoints is not None:
            self.endpoints = sorted(set(self.endpoints))
        if self.burst is None:
            return self
        if self.rate is None:
            raise ValueError("a burst needs a rate")
        least = math.ceil(self.rate * LEAST_BURST_S)
        if self.burst < least:
            raise ValueError(f"a rate of {self.rate:g}/s needs a burst of at least {least}")
        return self

    def allowance(self) -> access.Allowance:
        """Its limits, with the burst that they have."""
        burst = self.burst or (1 if self.rate is None else max(1, math.ceil(self.rate)))
        return access.Allowance(self.rate, burst, self.concurrency, self.day, self.month)


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A stored key; ``previous_digest`` is good until ``previous_until``, after a rotation."""

    id: str
    spec: KeySpec
    digest: str
    created_at: datetime
    previous_digest: str | None = None
    previous_until: datetime | None = None
    revoked_at: datetime | None = None
    revision: int = 0

    def state(self, now: datetime) -> str:
        """``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.spec.expires_at is not None and self.spec.expires_at <= now else "active"

    def for_gateways(self) -> access.Key:
        """What gateways need to know of it."""
        spec = self.spec
        endpoints = None if spec.endpoints is None else frozenset(spec.endpoints)
        return access.Key(
            principal=access.Principal(self.id, spec.name, frozenset(spec.scopes), endpoints),
            digest=self.digest,
            expires_ms=_ms(spec.expires_at),
            allowance=spec.allowance(),
            previous=self.previous_digest,
            previous_until_ms=_ms(self.previous_until) or 0.0,
        )


def _ms(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp() * 1e3


def spec_of(fields: Mapping[str, Any], now: datetime) -> KeySpec:
    """The checked spec; ``ttl_s`` may stand in place of ``expires_at``. Raises BadRequest."""
    given = dict(fields)
    ttl_s = given.pop("ttl_s", None)
    if ttl_s is not None:
        if given.get("expires_at") is not None:
            raise BadRequest("Give either ttl_s or expires_at.")
        given["expires_at"] = _after(now, ttl_s)
    spec = merge.checked(KeySpec, given, "key")
    if spec.expires_at is not None and spec.expires_at <= now:
        raise BadRequest("A key cannot expire before it is made.")
    return spec


def _after(now: datetime, ttl_s: Any) -> datetime:
    try:
        return now + timedelta(seconds=ttl_s)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"key: ttl_s must be a number of seconds, not {str(ttl_s)[:80]!r}.") from None


def made(spec: KeySpec, random: bytes, now: datetime) -> tuple[StoredKey, str]:
    """A new key, and the key itself, which is shown once. ``random``: ``ID_BYTES + SECRET_BYTES`` of it."""
    id_ = random[:ID_BYTES].hex()
    key = _key(id_, random[ID_BYTES:])
    return StoredKey(id_, spec, access.digest_of(key.encode()), now), key


def rotated(held: StoredKey, random: bytes, now: datetime, grace_s: float) -> tuple[StoredKey, str]:
    """The same key with another secret; the old one is good for ``grace_s`` more. Raises Conflict."""
    _alive(held)
    key = _key(held.id, random)
    until = now + timedelta(seconds=grace_s)
    if held.spec.expires_at is not None:
        until = min(until, held.spec.expires_at)
    return (
        replace(
            held,
            digest=access.digest_of(key.encode()),
            previous_digest=held.digest if grace_s else None,
            previous_until=until if grace_s else None,
        ),
        key,
    )


def changed(held: StoredKey, patch: Mapping[str, Any], now: datetime) -> StoredKey:
    """With some fields changed (JSON merge patch: null puts one back). Raises BadRequest, Conflict."""
    _alive(held)
    fields = merge.patched(held.spec.model_dump(exclude_none=True), patch)
    if "ttl_s" in fields or "expires_at" in patch:
        if "expires_at" not in patch:
            fields.pop("expires_at", None)
        return replace(held, spec=spec_of(fields, now))
    # A key that has expired may be given another name or limit without coming back to life.
    return replace(held, spec=merge.checked(KeySpec, fields, "key"))


def revoked(held: StoredKey, now: datetime) -> StoredKey:
    """Good no longer; revoked already: as it is."""
    if held.revoked_at is not None:
        return held
    return replace(held, revoked_at=now, previous_digest=None, previous_until=None)


def _alive(held: StoredKey) -> None:
    if held.revoked_at is not None:
        raise Conflict(f"Key {held.id} is revoked.")


def _key(id_: str, secret: bytes) -> str:
    return access.key_of(id_, base64.urlsafe_b64encode(secret).rstrip(b"=").decode())
