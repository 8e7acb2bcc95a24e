"""What of the control plane may be asked through the gateway, and by whom."""

from __future__ import annotations

from tidegate.protocol.access import ADMIN, OPERATE, PUBLISH

SERVICES = ("registry", "router", "autoscaler")

# Between services only: digests of keys, and what the router says of roll-overs.
_INTERNAL = ("/v1/keys/table", "/v1/replicas")
_ADMINS = ("/v1/keys", "/v1/audit", "/v1/usage")


def scopes_for(service: str, method: str, path: str) -> tuple[str, ...]:
    """The scopes of which one is needed for a call; none: nobody may make it from outside.

    ``path`` is the service's own, decoded, beginning with ``/``.
    """
    if any(step in ("", ".", "..") for step in path[1:].split("/")) or service not in SERVICES:
        return ()
    if service != "registry":
        return (OPERATE,)
    if path in _INTERNAL or path.endswith("/quota"):
        return ()
    if path.startswith(_ADMINS):
        return (ADMIN,)
    if path.startswith("/v1/endpoints/") and path.endswith("/settle"):
        return (OPERATE,)
    if path.startswith("/v1/deployments/") and path.endswith("/override"):
        return (OPERATE,)
    return (PUBLISH, OPERATE) if method in ("GET", "HEAD") else (PUBLISH,)
