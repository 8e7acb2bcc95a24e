"""The principal in the claims of a verified JWT."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tidegate.kernel.protocol.access import JWT_PREFIX, SCOPES, Principal
from tidegate.kernel.protocol.caller_limits import CallerLimits

# The key in the setting of limits for callers without one of the other roles.
EVERYONE = "*"
_ID_CHARS = 120


def principal_of(
    claims: Mapping[str, Any],
    roles_claim: str,
    scopes_of: Mapping[str, Sequence[str]],
    limits: Mapping[str, CallerLimits] = MappingProxyType({}),
) -> Principal:
    """Return the principal of a token with these claims.

    ``roles_claim``: the claim that contains the roles. It is one name, or several names with dots between
    them, such as Keycloak's ``realm_access.roles``. ``scopes_of``: the scopes of each role. If ``scopes_of``
    is empty, each role that has the name of a scope grants this scope. ``limits``: the limits by role. If the
    token has several of these roles, the first one in ``limits`` applies. If it has none of them, the limits
    under ``*`` apply.
    """
    subject = str(claims["sub"])
    if len(subject) > _ID_CHARS or not subject.isprintable():
        subject = hashlib.sha256(subject.encode(errors="surrogatepass")).hexdigest()
    display_name = claims.get("preferred_username") or claims.get("name") or subject
    name = "".join(filter(str.isprintable, str(display_name)))[:_ID_CHARS]
    scopes: set[str] = set()
    roles = _roles(claims, roles_claim)
    for role in roles:
        scopes.update(scopes_of.get(role, ()) if scopes_of else {role} & set(SCOPES))
    limited = next((role for role in limits if role in roles), EVERYONE if EVERYONE in limits else "")
    weight = limits[limited].weight if limited else 1
    return Principal(JWT_PREFIX + subject, name, frozenset(scopes), weight=weight, role=limited)


def _roles(claims: Mapping[str, Any], path: str) -> list[str]:
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        return value.split()  # OAuth's `scope` is one string, separated by spaces
    return [role for role in value if isinstance(role, str)] if isinstance(value, list) else []
