"""Check every request before the app sees it: its origin, its credential and its scope."""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.kernel import errors, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import new_request_id
from tidegate.kernel.http.heads import LOOPBACK, is_local, without_page
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.permissions import OPEN, RoutePermissions, has_control_character
from tidegate.kernel.service import caller
from tidegate.kernel.service.caller import Caller, ServiceToken
from tidegate.kernel.service.error_answers import error_response, internal_error
from tidegate.kernel.settings.base import Settings

log = telemetry.logger(__name__)

# Paths that are called very often. Successful calls of these paths are logged only at level DEBUG.
QUIET = ("/health/", "/metrics", "/docs", "/openapi.json")
LONGEST_PATH = 500


# A function that returns the principal of a request's headers, or raises Unauthorized.
Identify = Callable[[dict[bytes, bytes]], Principal]
# A function that returns the answer to a failed request. Its arguments are the request's path, the error and
# the request's id.
AnswerError = Callable[[str, TidegateError, str], Response]


class Guard:
    """ASGI middleware that checks the origin, the credential and the scope of each request, and logs it.

    Loopback is not a trust boundary, because a page in a browser can post to it. So a service on loopback
    refuses a request with a foreign ``Host`` (DNS rebinding), ``Origin`` or ``Sec-Fetch-Site``. Requests from
    pages of ``origins`` are accepted.

    Every route that is not open needs a credential that ``identify`` accepts, such as the service token. The
    credential belongs to a principal, or to a service that calls on behalf of a principal. This principal
    needs a scope that ``permissions`` lists for the route. A path that is not in ``permissions`` gets "not
    found".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        permissions: RoutePermissions,
        identify: Identify | None,
        origins: Container[object],
        answer_error: AnswerError | None = None,
    ) -> None:
        """Set up the guard of ``app``.

        ``answer_error`` makes the answer to a refused request. None: the answer has Tidegate's format.
        """
        self._app = app
        self._answer_error = answer_error or (lambda _path, error, rid: error_response(error, rid))
        self._token = ServiceToken(settings.service_token)
        self._identify = identify or self._token.identify
        self._permissions = permissions
        self._local = settings.host in LOOPBACK
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Change the ASGI scope itself instead of a copy, because an outer middleware reads the path later.
        scope["path"] = without_slash(scope["path"])
        headers = without_page(dict(scope["headers"]), self._origins)
        rid = telemetry.shown_id(headers.get(b"x-request-id", b"")) or new_request_id()
        mark, caller_mark = telemetry.request_id.set(rid), caller.current.set(caller.OWN_WORK)
        started, status, answering, named = time.perf_counter(), 500, False, ""

        async def send_with_id(message: Message) -> None:
            nonlocal status, answering
            if message["type"] == "http.response.start":
                status, answering = message["status"], True
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", rid.encode("latin-1"))],
                }
            await send(message)

        try:
            try:
                who = self._admit(scope["method"], scope["path"], headers)
            except TidegateError as refusal:
                await self._answer_error(scope["path"], refusal, rid)(scope, receive, send_with_id)
            else:
                named = who.id
                caller.current.set(Caller(who, self._origin(scope, headers)))
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            # Answer here, because a handler of the framework would answer without the request id.
            log.error("unexpected error", exc_info=error)
            if answering:
                raise
            await internal_error(rid)(scope, receive, send_with_id)
        finally:
            quiet = status < 400 and (scope["method"] == "GET" or scope["path"].startswith(QUIET))
            log.log(
                10 if quiet else 20,
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"][:LONGEST_PATH],
                    "status": status,
                    "caller": named,
                    "ms": round((time.perf_counter() - started) * 1e3, 2),
                },
            )
            telemetry.request_id.reset(mark)
            caller.current.reset(caller_mark)

    def _admit(self, method: str, path: str, headers: dict[bytes, bytes]) -> Principal:
        if self._local and not is_local(headers):
            raise errors.Forbidden(
                "This address answers only to local callers: the Host, Origin or Sec-Fetch-Site header is "
                "missing or foreign."
            )
        found = self._permissions.methods(path)
        scopes = found[1].get(method) if found is not None else None
        if scopes == (OPEN,):
            return ANONYMOUS
        who = self._identify(headers)
        if has_control_character(path):
            raise errors.BadRequest("the path has a control character; names cannot have any")
        if found is None:
            raise errors.NotFound(f"there is no path {path[:80]!r} here; /openapi.json lists all paths")
        if scopes is None:
            allowed = tuple(found[1])
            raise errors.MethodNotAllowed(
                f"this path accepts {', '.join(allowed)}, not {method[:20]}", allowed=allowed
            )
        return caller.permit(who, scopes)

    def _origin(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        told = headers.get(access.ORIGIN_HEADER)
        if told is not None and self._token.given(headers):
            return told.decode("latin-1")[:64]
        client = scope.get("client")
        return str(client[0]) if client else ""


def without_slash(path: str) -> str:
    """Return a path without its trailing slash. ``/v2/`` means ``/v2``, as in Triton."""
    return path[:-1] if path.endswith("/") and len(path) > 1 else path
