"""For whom the work at hand is done: it runs through a service as the request id does."""

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
    """Who asked, and from which address; ``origin`` is empty where nobody did (a service's own work)."""

    principal: Principal
    origin: str = ""


OWN_WORK = Caller(SERVICE)

current: ContextVar[Caller] = ContextVar("caller", default=OWN_WORK)


def onward() -> dict[str, str]:
    """Headers that tell the next service for whom it is asked; believed only with the service token."""
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
    """Who holds the service token is Tidegate itself, or asks for somebody whom it has authenticated."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._metrics_token = access.metrics_token(token).encode()

    def given(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether these headers carry the token."""
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return bool(self._token) and hmac.compare_digest(given, self._token)

    def scrapes(self, headers: Mapping[bytes, bytes]) -> bool:
        """Return whether these headers carry the metrics token."""
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return bool(self._token) and hmac.compare_digest(given, self._metrics_token)

    def identify(self, headers: dict[bytes, bytes]) -> Principal:
        """The holder, or for whom it asks; raises Unauthorized for anybody else."""
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
    """The caller at hand, if it may do deeds of one of these scopes.

    Raises Forbidden, or Unauthorized for a caller of whom nothing is known.
    """
    return permit(current.get().principal, scopes)


def permit(who: Principal, scopes: tuple[str, ...]) -> Principal:
    """Return ``who`` if one of these scopes, or a special word of the permissions, lets it in.

    Raises Forbidden, or Unauthorized for a caller of whom nothing is known.
    """
    if INTERNAL in scopes:
        if who is SERVICE:
            return who
        raise Forbidden("this route is for Tidegate's own services, not for callers from outside")
    if OPEN in scopes or ANY in scopes or any(who.may(scope) for scope in scopes):
        return who
    if who is ANONYMOUS:
        raise Unauthorized(
            f"this needs a key with the scope {' or '.join(scopes)}: an admin makes one with "
            f"`tidegate keys create NAME --scope {scopes[0]}`"
        )
    raise Forbidden(access.lacks(who, scopes))


def needs(*scopes: str) -> Callable[[], Awaitable[Principal]]:
    """:func:`require` as a FastAPI dependency."""

    async def principal() -> Principal:
        return require(*scopes)

    return principal
