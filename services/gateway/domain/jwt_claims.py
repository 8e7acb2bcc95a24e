"""What the claims of a verified JWT make of its bearer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.kernel.protocol.access import JWT_PREFIX, SCOPES, Principal

_ID_CHARS = 120


def principal_of(
    claims: Mapping[str, Any], roles_claim: str, scopes_of: Mapping[str, Sequence[str]]
) -> Principal:
    """The bearer. ``roles_claim`` may lead into objects by dots, as Keycloak's ``realm_access.roles`` does.

    ``scopes_of`` maps roles to scopes; when it is empty a role that is called like a scope gives that scope.
    """
    subject = str(claims["sub"])
    if len(subject) > _ID_CHARS or not subject.isprintable():
        subject = hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
    told = claims.get("preferred_username") or claims.get("name") or subject
    name = "".join(filter(str.isprintable, str(told)))[:_ID_CHARS]
    found: set[str] = set()
    for role in _roles(claims, roles_claim):
        found.update(scopes_of.get(role, ()) if scopes_of else {role} & set(SCOPES))
    return Principal(JWT_PREFIX + subject, name, frozenset(found))


def _roles(claims: Mapping[str, Any], path: str) -> list[str]:
    at: Any = claims
    for step in path.split("."):
        at = at.get(step) if isinstance(at, Mapping) else None
    if isinstance(at, str):
        return at.split()  # as OAuth's `scope` has it
    return [role for role in at if isinstance(role, str)] if isinstance(at, list) else []
