"""Routes of API keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import Field, WithJsonSchema

from services.registry.api.bodies import Items
from services.registry.api.dependencies import KeyringDep, guarded, set_etag
from services.registry.domain.keys import KeySpec, StoredKey
from tidegate.kernel.protocol.access import ADMIN, KEY_PREFIX
from tidegate.kernel.protocol.caller_limits import TokenLimits
from tidegate.kernel.protocol.models import Noun
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import needs

router = APIRouter(
    prefix="/v1/keys", tags=["keys"], dependencies=[Depends(needs(ADMIN))], route_class=JsonRoute
)
GUARDED = guarded("key")

_FIELDS = KeySpec.model_json_schema()["properties"] | {
    "ttl_s": {"type": "number"},
    "endpoint_tokens": {"type": "object", "additionalProperties": TokenLimits.model_json_schema()},
}
# These types are dicts and not pydantic classes, because an absent field and null have different meanings.
# The domain checks the fields.
KeyFields = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "properties": _FIELDS, "required": ["name"]})
]
KeyPatch = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "properties": _FIELDS})]


class KeyInfo(KeySpec):
    """A key without its secret."""

    id: str
    prefix: str = Field(description="The first characters of the key.")
    state: str = Field(description="State of the key: active, expired or revoked.")
    created_at: datetime
    revoked_at: datetime | None
    previous_until: datetime | None = Field(
        description="The time until which the secret before the last rotation also works."
    )


class KeyMade(KeyInfo):
    """A key with its secret. No later response contains the secret."""

    key: str


class RotateBody(Noun):
    """The body of a rotation. ``grace_s``: seconds for which the old secret still works."""

    grace_s: float = Field(0.0, ge=0, le=30 * 86_400)


def _now(request: Request) -> datetime:
    now: datetime = request.app.state.transactions.now()
    return now


Now = Annotated[datetime, Depends(_now)]


@router.post("", status_code=201)
async def create(keyring: KeyringDep, now: Now, body: KeyFields, response: Response) -> KeyMade:
    """Create a key. Only this response contains its secret."""
    stored, key = await keyring.create(body)
    set_etag(response, str(stored.revision))
    return KeyMade(**_fields(stored, now), key=key)


@router.get("")
async def list_all(
    keyring: KeyringDep,
    now: Now,
    all: Annotated[bool, Query(description="Include revoked and expired keys.")] = False,
) -> Items[KeyInfo]:
    """Return the keys, oldest first. With ``all``, include revoked and expired keys."""
    keys = [_info(stored, now) for stored in await keyring.all()]
    return Items(items=[key for key in keys if all or key.state == "active"])


@router.get("/table", include_in_schema=False)
async def table(
    keyring: KeyringDep, response: Response, known: Annotated[str, Header(alias="If-None-Match")] = ""
) -> Any:
    """Return all keys that are not revoked, for gateways. Return 304 if ``If-None-Match`` has their ETag."""
    mark, keys = await keyring.for_gateways(known.strip('"'))
    if keys is None:
        return Response(status_code=304, headers={"ETag": f'"{mark}"'})
    response.headers["ETag"] = f'"{mark}"'
    return {"mark": mark, "keys": [stored.for_gateways().to_dict() for stored in keys]}


@router.get("/{id_}")
async def get(keyring: KeyringDep, now: Now, id_: str, response: Response) -> KeyInfo:
    """Return one key. The ``ETag`` is its revision."""
    return _info(await keyring.get(id_), now, response)


@router.patch("/{id_}", dependencies=[GUARDED])
async def patch(keyring: KeyringDep, now: Now, id_: str, body: KeyPatch, response: Response) -> KeyInfo:
    """Change some fields by a JSON merge patch. null restores a field's default."""
    return _info(await keyring.change(id_, body), now, response)


@router.post("/{id_}/rotate", dependencies=[GUARDED])
async def rotate(
    keyring: KeyringDep, now: Now, id_: str, response: Response, body: RotateBody | None = None
) -> KeyMade:
    """Replace the secret of a key. Its name, limits and usage stay the same."""
    stored, key = await keyring.rotate(id_, body.grace_s if body else 0.0)
    set_etag(response, str(stored.revision))
    return KeyMade(**_fields(stored, now), key=key)


@router.delete("/{id_}", dependencies=[GUARDED])
async def revoke(keyring: KeyringDep, now: Now, id_: str, response: Response) -> KeyInfo:
    """Revoke a key. This cannot be undone. The key stays in the list of all keys."""
    return _info(await keyring.revoke(id_), now, response)


def _info(stored: StoredKey, now: datetime, response: Response | None = None) -> KeyInfo:
    if response is not None:
        set_etag(response, str(stored.revision))
    return KeyInfo(**_fields(stored, now))


def _fields(stored: StoredKey, now: datetime) -> dict[str, Any]:
    previous_until = stored.previous_until
    return {
        **stored.spec.model_dump(),
        "id": stored.id,
        "prefix": f"{KEY_PREFIX}{stored.id}",
        "state": stored.state(now),
        "created_at": stored.created_at,
        "revoked_at": stored.revoked_at,
        "previous_until": previous_until if previous_until and previous_until > now else None,
    }
