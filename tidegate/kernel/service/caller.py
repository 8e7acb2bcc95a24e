"""The caller of the current request, kept in a context variable like the request id."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden, Unauthorized
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import ANONYMOUS, SCRAPER, SERVICE, Principal
from tidegate.kernel.protocol.permissions import ANY, INTERNAL, OPEN


@dataclass(frozen=True, slots=True)
class Caller:
    """A principal, and the network address from which its request came (``origin``).

    ``origin`` is empty for a service's own work.
    """

    principal: Principal
    origin: str = ""


OWN_WORK = Caller(SERVICE)

current: ContextVar[Caller] = ContextVar("caller", default=OWN_WORK)


def onward() -> dict[str, str]:
    """Return headers that tell the next service who the current caller is.

    The next service reads the caller only from requests that also have the service token.
    """
    caller = current.get()
    told = {}
    if caller.principal is not SERVICE:
        told[access.PRINCIPAL_HEADER.decode()] = caller.principal.to_header()
    if caller.origin:
        told[access.ORIGIN_HEADER.decode()] = caller.origin
    if rid := telemetry.request_id.get():
        told["x-request-id"] = rid
    return told


class ServiceToken:
    """The service token. A service that sends it may call on behalf of a principal."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._metrics_token = access.metrics_token(token).encode()

    def given(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return True if these headers carry the token."""
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return bool(self._token) and hmac.compare_digest(given, self._token)

    def scrapes(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return True if these headers carry the metrics token."""
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return bool(self._token) and hmac.compare_digest(given, self._metrics_token)

    def identify(self, headers: dict[bytes, bytes]) -> Principal:
        """Return the calling service, or the principal on whose behalf it calls.

        For the metrics token, return ``SCRAPER``. Raise Unauthorized if the token is missing or wrong.
        """
        if self.scrapes(headers):
            return SCRAPER
        if not self.given(headers):
            raise Unauthorized(
                "Needs 'Authorization: Bearer <service token>'; the token is in <state>/token."
            )
        try:
            return access.carried(headers)
        except ValueError as error:
            raise BadRequest(f"{access.PRINCIPAL_HEADER.decode()} cannot be read: {error}.") from None


def require(*scopes: str) -> Principal:
    """Return the current caller if it has one of these scopes. Otherwise, raise an error.

    Raises Unauthorized for an anonymous caller, and Forbidden for any other. :func:`permit` has the details.
    """
    return permit(current.get().principal, scopes)


def permit(principal: Principal, scopes: tuple[str, ...]) -> Principal:
    """Return ``principal`` if it has one of these scopes, or if the route needs no scope.

    Otherwise, raises Unauthorized for an anonymous caller, and Forbidden for any other. Only Tidegate's own
    services may call an internal route. Every other caller of it gets Forbidden.
    """
    if INTERNAL in scopes:
        if principal is SERVICE:
            return principal
        raise Forbidden("this route is for Tidegate's own services, not for callers from outside")
    if OPEN in scopes or ANY in scopes or any(principal.may(scope) for scope in scopes):
        return principal
    if principal is ANONYMOUS:
        raise Unauthorized(
            f"this needs a key with the scope {' or '.join(scopes)}: an admin makes one with "
            f"`tidegate keys create NAME --scope {scopes[0]}`"
        )
    raise Forbidden(access.lacks(principal, scopes))


def needs(*scopes: str) -> Callable[[], Awaitable[Principal]]:
    """Return a FastAPI dependency that calls :func:`require` with these scopes."""

    async def principal() -> Principal:
        return require(*scopes)

    return principal
