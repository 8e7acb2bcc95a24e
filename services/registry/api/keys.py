"""API keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import Field, WithJsonSchema

from services.registry.api.bodies import Items
from services.registry.application.keyring import Keyring
from services.registry.domain.keys import KeySpec, StoredKey
from tidegate.kernel.protocol.access import ADMIN, KEY_PREFIX
from tidegate.kernel.protocol.models import Noun
from tidegate.kernel.service.api import JsonRoute
from tidegate.kernel.service.caller import needs

router = APIRouter(
    prefix="/v1/keys", tags=["keys"], dependencies=[Depends(needs(ADMIN))], route_class=JsonRoute
)

_FIELDS = KeySpec.model_json_schema()["properties"] | {"ttl_s": {"type": "number"}}
# Read as plain fields, because what was left out matters; checked by the domain.
KeyFields = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "properties": _FIELDS, "required": ["name"]})
]
KeyPatch = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "properties": _FIELDS})]


class KeyInfo(KeySpec):
    """A key, as anybody may see it who manages keys."""

    id: str
    prefix: str = Field(description="What the key itself begins with.")
    state: str = Field(description="active, expired or revoked.")
    created_at: datetime
    revoked_at: datetime | None
    previous_until: datetime | None = Field(description="The secret from before a rotation is good until.")


class KeyMade(KeyInfo):
    """With the key itself, which is shown this once."""

    key: str


class RotateBody(Noun):
    """How long the old secret goes on being good."""

    grace_s: float = Field(0.0, ge=0, le=30 * 86_400)


def _keyring(request: Request) -> Keyring:
    found: Keyring = request.app.state.keyring
    return found


def _now(request: Request) -> datetime:
    found: datetime = request.app.state.registrar.now()
    return found


Core = Annotated[Keyring, Depends(_keyring)]
Now = Annotated[datetime, Depends(_now)]


@router.post("", status_code=201)
async def make(core: Core, now: Now, body: KeyFields) -> KeyMade:
    """Create a key. Only this answer contains its secret."""
    held, key = await core.make(body)
    return KeyMade(**_fields(held, now), key=key)


@router.get("")
async def list_all(
    core: Core, now: Now, all: Annotated[bool, Query(description="Revoked and expired ones, too.")] = False
) -> Items[KeyInfo]:
    """Return the keys, oldest first; revoked and expired ones only with ``all``."""
    found = [_info(held, now) for held in await core.all()]
    return Items(items=[info for info in found if all or info.state == "active"])


@router.get("/table", include_in_schema=False)
async def table(
    core: Core, response: Response, known: Annotated[str, Header(alias="If-None-Match")] = ""
) -> Any:
    """Return the keys for gateways, with their limits. 304 when ``If-None-Match`` is the state."""
    mark, found = await core.for_gateways(known.strip('"'))
    if found is None:
        return Response(status_code=304, headers={"ETag": f'"{mark}"'})
    response.headers["ETag"] = f'"{mark}"'
    return {"mark": mark, "keys": [held.for_gateways().to_dict() for held in found]}


@router.get("/{id_}")
async def get(core: Core, now: Now, id_: str) -> KeyInfo:
    """Return one key."""
    return _info(await core.get(id_), now)


@router.patch("/{id_}")
async def patch(core: Core, now: Now, id_: str, body: KeyPatch) -> KeyInfo:
    """Change some fields (JSON merge patch: null puts one back to its default)."""
    return _info(await core.change(id_, body), now)


@router.post("/{id_}/rotate")
async def rotate(core: Core, now: Now, id_: str, body: RotateBody | None = None) -> KeyMade:
    """Give a key a new secret. Its name, limits and usage stay."""
    held, key = await core.rotate(id_, body.grace_s if body else 0.0)
    return KeyMade(**_fields(held, now), key=key)


@router.delete("/{id_}")
async def revoke(core: Core, now: Now, id_: str) -> KeyInfo:
    """Revoke a key for good. It stays in the list of all keys, since usage and audit name it."""
    return _info(await core.revoke(id_), now)


def _info(held: StoredKey, now: datetime) -> KeyInfo:
    return KeyInfo(**_fields(held, now))


def _fields(held: StoredKey, now: datetime) -> dict[str, Any]:
    previous_until = held.previous_until
    return {
        **held.spec.model_dump(),
        "id": held.id,
        "prefix": f"{KEY_PREFIX}{held.id}",
        "state": held.state(now),
        "created_at": held.created_at,
        "revoked_at": held.revoked_at,
        "previous_until": previous_until if previous_until and previous_until > now else None,
    }
